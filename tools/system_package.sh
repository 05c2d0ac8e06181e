#!/usr/bin/env bash
# Install a Debian package, for the Makefile; where that cannot be done, say what to install and why.
# Usage: system_package.sh PACKAGE PURPOSE
set -euo pipefail

package=$1 purpose=$2

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "$purpose: not found on this machine. Install it (on Debian or Ubuntu: sudo apt-get install $package), then run make again." >&2
  exit 1
fi
echo "Installing $package: $purpose."
export DEBIAN_FRONTEND=noninteractive
apt-get install -y -qq --no-install-recommends "$package" >/dev/null 2>&1 && exit
# The list of packages may be missing or old.
apt-get update -qq
apt-get install -y -qq --no-install-recommends "$package" >/dev/null
