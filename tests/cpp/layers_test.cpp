#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "kernels/cpu/batch_norm.h"
#include "kernels/cpu/max_pool.h"
#include "kernels/cpu/relu.h"
#include "tables.h"

namespace swat::cpu {
namespace {

template <typename T>
std::vector<T> draw(int64_t count, uint32_t seed, bool special = false) {
  static const T odd[] = {T{0},
                          -T{0},
                          std::numeric_limits<T>::quiet_NaN(),
                          std::numeric_limits<T>::infinity(),
                          -std::numeric_limits<T>::infinity(),
                          std::numeric_limits<T>::denorm_min()};
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<T> data(count);
  for (T& v : data) {
    v = static_cast<T>(normal(random));
    if (special && random() % 8 == 0) v = odd[random() % std::size(odd)];
  }
  return data;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  if (a.empty() || b.empty()) return a.size() == b.size();  // memcmp takes no null pointers
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <typename T>
void check_relu(const KernelTable& table) {
  for (int64_t numel : {0, 1, 63, 64, 65, 127, 1000, 100'003}) {
    const std::vector<T> input = draw<T>(numel, 1, true), grad = draw<T>(numel, 2, true);
    std::vector<T> output(numel), grad_input(numel), expected(numel), expected_grad(numel);
    std::vector<uint64_t> words(ceil_div(numel, 64));
    relu<T>(table, threads(3), input.data(), numel, output.data(), words.data());
    relu_backward<T>(table, threads(3), grad.data(), words.data(), numel, grad_input.data());
    for (int64_t i = 0; i < numel; ++i) {
      expected[i] = input[i] < 0 ? 0 : input[i];
      expected_grad[i] = input[i] <= 0 ? 0 : grad[i];
    }
    EXPECT_TRUE(same_bits(output, expected)) << numel;
    EXPECT_TRUE(same_bits(grad_input, expected_grad)) << numel;
  }
}

template <typename T>
struct Norm {
  std::vector<T> output, scale, grad_input, grad_weight, grad_bias;
  std::vector<double> mean, invstd, variance;
  std::vector<uint16_t> codes;
};

template <typename T>
Norm<T> run_norm(const KernelTable& table, const Parallel& parallel, const NormShape& shape, Saved saved) {
  const int64_t numel = shape.numel(), channels = shape.channels, seed = 9;
  const std::vector<T> input = draw<T>(numel, 3), weight = draw<T>(channels, 4), grad = draw<T>(numel, 5);
  Norm<T> n;
  for (auto* vector : {&n.output, &n.grad_input}) vector->resize(numel);
  for (auto* vector : {&n.scale, &n.grad_weight, &n.grad_bias}) vector->resize(channels);
  for (auto* vector : {&n.mean, &n.invstd, &n.variance}) vector->resize(channels);
  n.codes.resize(numel);
  batch_norm<T>(table, parallel,
                {.shape = shape,
                 .input = input.data(),
                 .weight = {weight.data(), true},
                 .bias = {},
                 .eps = 1e-5,
                 .saved = saved,
                 .seed = &seed,
                 .output = n.output.data(),
                 .mean = n.mean.data(),
                 .invstd = n.invstd.data(),
                 .variance = n.variance.data(),
                 .codes = n.codes.data(),
                 .scale = n.scale.data()});
  const void* values = saved == Saved::exact ? static_cast<const void*>(input.data()) : n.codes.data();
  batch_norm_backward<T>(table, parallel,
                         {.shape = shape,
                          .grad_output = grad.data(),
                          .saved = saved,
                          .values = values,
                          .scale = n.scale.data(),
                          .mean = n.mean.data(),
                          .invstd = n.invstd.data(),
                          .weight = {weight.data(), true},
                          .grad_input = n.grad_input.data(),
                          .grad_weight = n.grad_weight.data(),
                          .grad_bias = n.grad_bias.data(),
                          .narrow = true});
  return n;
}

template <typename T>
void expect_close(const std::vector<T>& got, const std::vector<T>& expected, double tolerance, const char* name) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += (got[i] - expected[i]) * (got[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  EXPECT_LE(std::sqrt(error), tolerance * std::sqrt(norm)) << name;
}

// Against the portable kernels, which the Python tests hold against float64.
template <typename T>
void check_norm(const KernelTable& table) {
  const int64_t sizes[][3] = {{3, 5, 7}, {4, 64, 64}, {2, 257, 16}, {9, 33, 1}, {2, 70, 100}, {1, 3, 5000}};
  for (const auto& size : sizes) {
    for (bool channels_last : {false, true}) {
      const NormShape shape{size[0], size[1], size[2], channels_last};
      for (Saved saved : {Saved::exact, Saved::bf16, Saved::int8}) {
        const Norm<T> got = run_norm<T>(table, threads(1), shape, saved);
        const Norm<T> again = run_norm<T>(table, threads(3), shape, saved);
        EXPECT_TRUE(same_bits(got.output, again.output));
        EXPECT_TRUE(same_bits(got.codes, again.codes));
        EXPECT_TRUE(same_bits(got.grad_input, again.grad_input));
        const Norm<T> expected = run_norm<T>(portable_table, threads(1), shape, saved);
        expect_close(got.output, expected.output, 1e-5, "output");
        expect_close(got.mean, expected.mean, 1e-10, "mean");
        expect_close(got.variance, expected.variance, 1e-10, "variance");
        // The last bit of a sum seeds the random rounding: each instruction set rounds by numbers of its own.
        const double tolerance = saved == Saved::exact ? 1e-4 : saved == Saved::bf16 ? 1e-2 : 5e-2;
        expect_close(got.grad_input, expected.grad_input, tolerance, "grad_input");
        expect_close(got.grad_weight, expected.grad_weight, tolerance, "grad_weight");
      }
    }
  }
}

template <typename T>
void check_pool(const KernelTable& table) {
  for (int64_t channels : {1, 3, 16, 37, 100}) {
    for (bool channels_last : {false, true}) {
      const MaxPoolShape shape{.batch = 2,
                               .channels = channels,
                               .height = 9,
                               .width = 11,
                               .out_height = 5,
                               .out_width = 6,
                               .kernel_height = 3,
                               .kernel_width = 3,
                               .stride_height = 2,
                               .stride_width = 2,
                               .pad_height = 1,
                               .pad_width = 1,
                               .dilation_height = 1,
                               .dilation_width = 1,
                               .channels_last = channels_last};
      const int64_t outputs = 2 * channels * 5 * 6, inputs = 2 * channels * 9 * 11;
      const std::vector<T> input = draw<T>(inputs, 6, true), grad = draw<T>(outputs, 7);
      auto run = [&](const KernelTable& kernels, int64_t count) {
        std::vector<T> output(outputs), grad_input(inputs);
        std::vector<uint8_t> positions(outputs);
        max_pool<T>(kernels, threads(count), shape, input.data(), output.data(), positions.data());
        max_pool_backward<T>(kernels, threads(count), shape, grad.data(), positions.data(), grad_input.data());
        return std::tuple(output, positions, grad_input);
      };
      const auto [output, positions, grad_input] = run(table, 3);
      const auto [expected, expected_positions, expected_grad] = run(portable_table, 1);
      EXPECT_TRUE(same_bits(output, expected)) << channels;
      EXPECT_TRUE(same_bits(positions, expected_positions)) << channels;
      EXPECT_TRUE(same_bits(grad_input, expected_grad)) << channels;
    }
  }
}

using LayersTest = TableTest;
INSTANTIATE_TEST_SUITE_P(Sets, LayersTest, testing::ValuesIn(tables()), table_name);

TEST_P(LayersTest, Relu) {
  check_relu<float>(table());
  check_relu<double>(table());
}

TEST_P(LayersTest, BatchNorm) {
  check_norm<float>(table());
  check_norm<double>(table());
}

TEST_P(LayersTest, MaxPool) {
  check_pool<float>(table());
  check_pool<double>(table());
}

}  // namespace
}  // namespace swat::cpu
