import common


def write(out, folder):
    return {}, "todo"
