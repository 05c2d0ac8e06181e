// How a driver spreads work over threads it does not own.
#pragma once

#include <cstdint>
#include <functional>

namespace swat::cpu {

struct Parallel {
  // Call body on ranges that together cover [0, count), on several threads or on one, and return when all are done.
  std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body)> run;
  int64_t threads;  // a hint: results never depend on it

  void operator()(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) const {
    if (count > 0) run(count, grain, body);
  }
};

}  // namespace swat::cpu
