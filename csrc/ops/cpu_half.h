// bfloat16 and float16 on the CPU: kept in memory as such, computed in float32. An operator is wrapped so that its half operands are
// widened before it and its result, the first of several, is rounded after it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <utility>

#include "checks.h"

namespace swat {

inline bool is_half(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }

inline Tensor widened(const Tensor& tensor) { return torch::stable::to(tensor, ScalarType::Float); }

// What is not a tensor of the dtype stays as it is: a mask, a size, a tensor that the operator will refuse.
template <typename A>
decltype(auto) widened_if(A&& argument, ScalarType dtype) {
  using Plain = std::remove_cvref_t<A>;
  if constexpr (std::is_same_v<Plain, Tensor>) {
    return argument.scalar_type() == dtype ? widened(argument) : Tensor(argument);
  } else if constexpr (std::is_same_v<Plain, std::optional<Tensor>>) {
    return argument && argument->scalar_type() == dtype ? Plain(widened(*argument)) : Plain(argument);
  } else {
    return std::forward<A>(argument);
  }
}

inline Tensor narrowed(const Tensor& result, ScalarType dtype) { return torch::stable::to(result, dtype); }

template <typename... Others>
std::tuple<Tensor, Others...> narrowed(const std::tuple<Tensor, Others...>& results, ScalarType dtype) {
  std::tuple<Tensor, Others...> copy = results;
  std::get<0>(copy) = narrowed(std::get<0>(results), dtype);
  return copy;
}

// That no operand is float32 where the first is half: widened, the two would pass for one dtype.
template <typename A>
void check_half(const A& argument, ScalarType dtype) {
  auto check = [&](const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.scalar_type() != ScalarType::Float,
                    "weight_values, input_values, bias or threshold: expected the scalar type of the first argument, ",
                    static_cast<int>(dtype), ", got ", static_cast<int>(ScalarType::Float));
  };
  if constexpr (std::is_same_v<A, Tensor>) {
    check(argument);
  } else if constexpr (std::is_same_v<A, std::optional<Tensor>>) {
    if (argument) check(*argument);
  }
}

template <auto kFunction>
struct InFloat;

template <typename R, typename First, typename... Others, R (*kFunction)(First, Others...)>
struct InFloat<kFunction> {
  static R call(First first, Others... others) {
    const ScalarType dtype = first.scalar_type();
    if (!is_half(dtype)) return kFunction(first, others...);
    (check_half<std::remove_cvref_t<Others>>(others, dtype), ...);
    return narrowed(kFunction(widened(first), widened_if(others, dtype)...), dtype);
  }
};

}  // namespace swat
