#include "kernels/cpu/convolution.h"

#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "kernels/cpu/gather_plan.h"
#include "kernels/cpu/packing.h"
#include "tables.h"

namespace swat::cpu {
namespace {

// A dense [N, C, H, W] tensor in one of three layouts, with room around it that no kernel may touch.
template <typename T>
struct Image {
  std::vector<T> data;
  ImageView<T> view;

  Image(int64_t n, int64_t c, int64_t h, int64_t w, int layout) {
    view = {nullptr, n, c, h, w, c * h * w, h * w, w, 1};
    if (layout == 1) view = {nullptr, n, c, h, w, c * h * w, 1, w * c, c};
    if (layout == 2)
      view = {nullptr, n, c, h, w, 2 * c * h * w, 2 * w * h, 2, 2 * h};  // every other element, columns outermost
    data.assign(2 * n * c * h * w + 1, T{0});
    view.data = data.data();
  }
  T& at(int64_t n, int64_t c, int64_t h, int64_t w) {
    return view.data[n * view.batch_stride + c * view.channel_stride + h * view.row_stride + w * view.column_stride];
  }
  ImageView<const T> read() const {
    return {view.data,         view.batch,          view.channels,   view.height,       view.width,
            view.batch_stride, view.channel_stride, view.row_stride, view.column_stride};
  }
};

template <typename T>
struct PackedTensor {
  std::vector<T> values;
  std::vector<uint64_t> words;
  std::vector<int64_t> ranks;
  int64_t numel;

  PackedTensor(const std::vector<T>& dense) : numel(static_cast<int64_t>(dense.size())) {
    words.resize((numel + 63) / 64);
    ranks.resize((numel + kBlockBits - 1) / kBlockBits);
    PlanesView<const T> view{dense.data(), 1, std::max<int64_t>(numel, 1), numel, 0, 0, 1};
    compress<T>(portable_table, threads(1), view, T{0}, words.data(), ranks.data(), [&](int64_t kept) {
      values.resize(kept);
      return values.data();
    });
  }
  PackedView<T> view() const { return {values.data(), words.data(), ranks.data(), numel}; }
};

template <typename T>
void check_convolution(const KernelTable& table, const ConvGeometry& g, std::mt19937& random) {
  std::normal_distribution<double> normal;
  // Runs of `together` elements are kept or dropped as one.
  auto sparse = [&](int64_t count, unsigned keep, int64_t together) {
    std::vector<T> dense(count);
    for (int64_t i = 0; i < count; i += together) {
      if (random() % 8 >= keep) continue;
      for (int64_t k = i; k < i + together; ++k) dense[k] = static_cast<T>(normal(random));
    }
    return dense;
  };
  const std::vector<T> weight =
      sparse(g.out_channels * g.group_in() * g.taps(), random() % 9, random() % 3 == 0 ? g.taps() : 1);
  const std::vector<T> kept_input = sparse(g.batch * g.in_channels * g.in_height * g.in_width, random() % 9, 1);
  Image<T> x(g.batch, g.in_channels, g.in_height, g.in_width, random() % 3);
  Image<T> y(g.batch, g.out_channels, g.out_height, g.out_width, random() % 3);
  Image<T> dy(g.batch, g.out_channels, g.out_height, g.out_width, random() % 3);
  Image<T> dx(g.batch, g.in_channels, g.in_height, g.in_width, random() % 3);
  for (T& v : x.data) v = static_cast<T>(normal(random));
  for (T& v : dy.data) v = static_cast<T>(normal(random));
  for (T& v : y.data) v = 77;
  for (T& v : dx.data) v = 77;
  std::vector<T> bias(g.out_channels);
  for (T& v : bias) v = static_cast<T>(normal(random));
  const PackedTensor<T> packed_weight(weight), packed_input(kept_input);
  std::vector<T> dw(weight.size(), 77);
  const bool dw_channels_last = random() % 2;

  const Parallel pool = threads(random() % 3 + 1);
  convolution<T>(table, pool, g, x.read(), packed_weight.view(), bias.data(), y.view);
  convolution_input_grad<T>(table, pool, g, dy.read(), packed_weight.view(), dx.view);
  convolution_weight_grad<T>(table, pool, g, dy.read(), packed_input.view(), dw.data(), dw_channels_last);

  std::vector<double> want_dx(kept_input.size()), want_dw(weight.size());
  const double tolerance = sizeof(T) == 4 ? 2e-4 : 1e-11;
  int64_t written = 0;
  for (int64_t n = 0; n < g.batch; ++n) {
    for (int64_t o = 0; o < g.out_channels; ++o) {
      const int64_t group = o / g.group_out();
      for (int64_t i = 0; i < g.out_height; ++i) {
        for (int64_t j = 0; j < g.out_width; ++j) {
          double sum = bias[o];
          for (int64_t c = 0; c < g.group_in(); ++c) {
            for (int64_t t = 0; t < g.taps(); ++t) {
              const int64_t h = i * g.stride_height - g.pad_top + t / g.kernel_width * g.dilation_height;
              const int64_t w = j * g.stride_width - g.pad_left + t % g.kernel_width * g.dilation_width;
              if (h < 0 || h >= g.in_height || w < 0 || w >= g.in_width) continue;
              const int64_t channel = group * g.group_in() + c;
              const int64_t at = (o * g.group_in() + c) * g.taps() + t;
              const int64_t pixel = ((n * g.in_channels + channel) * g.in_height + h) * g.in_width + w;
              sum += static_cast<double>(weight[at]) * x.at(n, channel, h, w);
              want_dx[pixel] += static_cast<double>(weight[at]) * dy.at(n, o, i, j);
              want_dw[at] += static_cast<double>(kept_input[pixel]) * dy.at(n, o, i, j);
            }
          }
          ASSERT_NEAR(y.at(n, o, i, j), sum, tolerance * (1 + std::abs(sum)));
          ++written;
        }
      }
    }
  }
  EXPECT_EQ(written, y.view.batch * y.view.channels * y.view.height * y.view.width);
  for (size_t i = 0; i < want_dx.size(); ++i) {
    const int64_t plane = static_cast<int64_t>(i) / (g.in_height * g.in_width);
    const T got = dx.at(plane / g.in_channels, plane % g.in_channels,
                        static_cast<int64_t>(i) / g.in_width % g.in_height, static_cast<int64_t>(i) % g.in_width);
    ASSERT_NEAR(got, want_dx[i], tolerance * (1 + std::abs(want_dx[i]))) << "dx " << i;
  }
  for (size_t i = 0; i < want_dw.size(); ++i) {
    const size_t taps = g.taps(), slice = g.group_in() * taps, channel = i % slice / taps;
    const size_t at = dw_channels_last ? i / slice * slice + i % taps * g.group_in() + channel : i;
    ASSERT_NEAR(dw[at], want_dw[i], tolerance * 4 * (1 + std::abs(want_dw[i]))) << "dw " << i;
  }
  // Nothing beside the tensors was written.
  auto untouched = [](const std::vector<T>& data) { return std::count(data.begin(), data.end(), T{77}); };
  EXPECT_EQ(untouched(y.data), static_cast<int64_t>(y.data.size()) - written);
  EXPECT_EQ(untouched(dx.data), static_cast<int64_t>(dx.data.size() - want_dx.size()));
}

ConvGeometry random_geometry(std::mt19937& random) {
  auto below = [&](int most) { return static_cast<int64_t>(random() % most); };
  ConvGeometry g;
  do {
    g.groups = below(3) == 0 ? below(4) + 1 : 1;
    g.in_channels = g.groups * (below(4) == 0 ? below(40) + 1 : below(9) + 1);
    g.out_channels = g.groups * (below(4) == 0 ? below(40) + 1 : below(9) + 1);
    if (below(6) == 0) {  // groups of few output channels, which have a kernel of their own
      g.groups = below(40) + 1;
      g.in_channels = g.groups * (below(3) == 0 ? 2 : 1);
      g.out_channels = g.groups * (below(2) == 0 ? 1 : below(5) + 1);
    }
    g.batch = below(3) == 0 ? below(20) : below(4);
    g.in_height = below(14) + 1;
    g.in_width = below(14) + 1;
    g.kernel_height = below(4) + 1 + (below(6) == 0 ? 3 : 0);
    g.kernel_width = below(4) + 1;
    const int longest_stride = below(20) == 0 ? 24 : 3;
    g.stride_height = below(longest_stride) + 1;
    g.stride_width = below(longest_stride) + 1;
    g.dilation_height = below(3) + 1;
    g.dilation_width = below(3) + 1;
    g.pad_top = below(4);
    g.pad_left = below(4);
    const int64_t spare_height = g.in_height + g.pad_top + below(4) - g.dilation_height * (g.kernel_height - 1) - 1;
    const int64_t spare_width = g.in_width + g.pad_left + below(4) - g.dilation_width * (g.kernel_width - 1) - 1;
    g.out_height = spare_height < 0 ? 0 : spare_height / g.stride_height + 1;
    g.out_width = spare_width < 0 ? 0 : spare_width / g.stride_width + 1;
  } while (g.out_height == 0 || g.out_width == 0);
  return g;
}

template <typename T>
void check_geometries(const KernelTable& table, int rounds) {
  std::mt19937 random(3);
  for (int round = 0; round < rounds; ++round) {
    const ConvGeometry g = random_geometry(random);
    check_convolution<T>(table, g, random);
    if (testing::Test::HasFatalFailure()) {
      FAIL() << "round " << round << ": batch " << g.batch << " groups " << g.groups << " in " << g.in_channels << "x"
             << g.in_height << "x" << g.in_width << " out " << g.out_channels << "x" << g.out_height << "x"
             << g.out_width << " kernel " << g.kernel_height << "x" << g.kernel_width << " stride " << g.stride_height
             << "," << g.stride_width << " dilation " << g.dilation_height << "," << g.dilation_width << " pad "
             << g.pad_top << "," << g.pad_left;
    }
  }
}

class ConvolutionTest : public TableTest {};

TEST_P(ConvolutionTest, AgreesWithTheDefinitionInFloat) { check_geometries<float>(table(), 120); }
TEST_P(ConvolutionTest, AgreesWithTheDefinitionInDouble) { check_geometries<double>(table(), 80); }

// Strides so long that the classes of pixels do not fit in 8 bits.
TEST_P(ConvolutionTest, TakesLongStrides) {
  std::mt19937 random(7);
  const ConvGeometry patches{2, 1, 3, 32, 48, 20, 2, 3, 16, 16, 16, 16, 1, 1, 0, 0};
  check_convolution<float>(table(), patches, random);
  check_convolution<double>(table(), patches, random);
  const ConvGeometry sparse{3, 2, 4, 45, 61, 6, 3, 4, 3, 5, 20, 20, 2, 1, 1, 2};
  check_convolution<float>(table(), sparse, random);
}

// A 1x1 convolution whose rows must not be joined: they are longer in the output.
TEST_P(ConvolutionTest, TakesPaddingBehindTheImageAlone) {
  std::mt19937 random(9);
  const ConvGeometry g{7, 2, 4, 18, 12, 54, 20, 16, 1, 1, 1, 1, 1, 1, 0, 0};
  check_convolution<float>(table(), g, random);
}

// Groups of few output channels: tiles of rows, tiles of columns, taps too far apart for a patch, more than one input channel.
TEST_P(ConvolutionTest, TakesGroupsOfFewChannels) {
  std::mt19937 random(11);
  for (const ConvGeometry& g : {ConvGeometry{3, 21, 21, 60, 33, 21, 60, 33, 3, 3, 1, 1, 1, 1, 1, 1},
                                ConvGeometry{1, 9, 9, 4, 900, 9, 4, 899, 2, 7, 1, 1, 1, 1, 1, 2},
                                ConvGeometry{1, 16, 16, 70, 66, 16, 3, 4, 2, 2, 2, 1, 66, 63, 1, 0},
                                ConvGeometry{5, 11, 11, 12, 14, 33, 6, 13, 3, 3, 2, 1, 1, 1, 0, 1},
                                ConvGeometry{4, 9, 27, 10, 13, 9, 9, 13, 3, 2, 1, 1, 1, 1, 1, 1}}) {
    check_convolution<float>(table(), g, random);
    check_convolution<double>(table(), g, random);
  }
}

TEST_P(ConvolutionTest, DoesNotDependOnThreads) {
  std::mt19937 random(13);
  std::normal_distribution<float> normal;
  for (const ConvGeometry& g : {ConvGeometry{5, 21, 21, 20, 13, 42, 20, 13, 3, 3, 1, 1, 1, 1, 1, 1},
                                ConvGeometry{1, 24, 24, 9, 9, 24, 5, 5, 3, 3, 2, 2, 1, 1, 1, 1},
                                ConvGeometry{3, 1, 8, 15, 11, 20, 15, 11, 3, 3, 1, 1, 1, 1, 1, 1}}) {
    std::vector<float> dense(g.batch * g.in_channels * g.in_height * g.in_width);
    for (float& v : dense) v = random() % 4 == 0 ? normal(random) : 0;
    const PackedTensor<float> input(dense);
    Image<float> dy(g.batch, g.out_channels, g.out_height, g.out_width, random() % 3);
    for (float& v : dy.data) v = normal(random);
    std::vector<float> first;
    for (int count : {1, 2, 3, 7}) {
      std::vector<float> dw(g.out_channels * g.group_in() * g.taps());
      convolution_weight_grad<float>(table(), threads(count), g, dy.read(), input.view(), dw.data(), false);
      if (first.empty()) first = dw;
      EXPECT_EQ(std::memcmp(first.data(), dw.data(), dw.size() * sizeof(float)), 0) << count << " threads";
    }
  }
}

TEST_P(ConvolutionTest, RefusesStridesThatNamePastItsClasses) {
  const ConvGeometry g{1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 257, 256, 1, 1, 0, 0};
  const PackedTensor<float> input(std::vector<float>{1});
  Image<float> dy(1, 1, 1, 1, 0);
  float dw = 0;
  EXPECT_THROW(convolution_weight_grad<float>(table(), threads(1), g, dy.read(), input.view(), &dw, false),
               std::invalid_argument);
}

TEST_P(ConvolutionTest, FindsRuns) {
  const Kernels<float>& kernels = table().float32;
  const std::vector<GatherEntry<float>> entries = {{1, 0},  {1, 32}, {1, 64}, {1, 400}, {1, 432}, {1, 464},
                                                   {1, 64}, {1, 32}, {1, 0},  {1, 0},   {1, 32},  {1, 96}};
  auto are_runs = [&](std::vector<int64_t> starts, int64_t step) {
    return kernels.are_runs(entries.data(), starts.data(), 0, static_cast<int64_t>(starts.size()) - 1, step);
  };
  EXPECT_TRUE(are_runs({0, 3, 3, 6}, 32));
  EXPECT_TRUE(are_runs({0, 6}, 32));
  EXPECT_TRUE(are_runs({6, 9}, -32));
  EXPECT_FALSE(are_runs({0, 6}, 64));
  EXPECT_FALSE(are_runs({0, 9}, 32));
  EXPECT_FALSE(are_runs({9, 12}, 32));
  EXPECT_FALSE(are_runs({0, 2}, 32));
  EXPECT_FALSE(are_runs({1, 4}, 32));
}

INSTANTIATE_TEST_SUITE_P(Sets, ConvolutionTest, testing::ValuesIn(tables()), table_name);

// Every tap must find, `i` places after its packed position, the coordinate of output i.
TEST(PackAxis, PutsNeighbouringOutputsSideBySide) {
  std::mt19937 random(5);
  for (int round = 0; round < 300; ++round) {
    const int64_t tile = random() % 8 + 1, step = random() % 4 + 1;
    std::vector<int64_t> taps;
    int64_t at = static_cast<int64_t>(random() % 9) - 6;
    for (unsigned k = random() % 7; k-- > 0; at += random() % 5 + 1) taps.push_back(random() % 5 == 0 ? kNoTap : at);
    const PackedAxis axis = pack_axis(tile, step, taps);
    ASSERT_EQ(axis.tap.size(), taps.size());
    for (size_t k = 0; k < taps.size(); ++k) {
      if (taps[k] == kNoTap) {
        EXPECT_EQ(axis.tap[k], -1);
        continue;
      }
      ASSERT_GE(axis.tap[k], 0);
      for (int64_t i = 0; i < tile; ++i) ASSERT_EQ(axis.source.at(axis.tap[k] + i), taps[k] + i * step);
    }
    // No coordinate is packed twice.
    std::vector<int64_t> sorted = axis.source;
    std::sort(sorted.begin(), sorted.end());
    EXPECT_EQ(std::adjacent_find(sorted.begin(), sorted.end()), sorted.end());
  }
}

GatherShape with_kernel(int64_t taps, int64_t channels) {
  GatherShape shape{.batch = 1,
                    .out_height = 2,
                    .out_width = 2,
                    .step_h = 1,
                    .step_w = 1,
                    .row_taps = std::vector<int64_t>(taps),
                    .column_taps = {},
                    .groups = 1,
                    .group_channels = channels,
                    .group_rows = 3,
                    .entries = taps,
                    .element_bytes = 4,
                    .vector_bytes = 64};
  std::iota(shape.row_taps.begin(), shape.row_taps.end(), 0);
  shape.column_taps = shape.row_taps;
  return shape;
}

// Offsets in a tile have 32 bits: large kernels leave room for few channels, or for none.
TEST(GatherPlan, TilesFitTheirOffsets) {
  const RegisterTile tiles[] = {{4, 4}, {1, 8}};
  for (int64_t taps : {1, 30, 1000, 1500, 5000}) {
    const GatherPlan plan = plan_gather(with_kernel(taps, 300), tiles, 2, 2);
    const size_t pixels = plan.rows.source.size() * plan.columns.source.size();
    EXPECT_LE(pixels * plan.block_channels * 64, taps < 5000 ? size_t{256} << 20 : size_t{INT32_MAX}) << taps;
    int64_t next = 0;
    for (const ChannelBlock& block : plan.blocks) {
      EXPECT_EQ(block.channel_begin, next);
      next = block.channel_end;
      EXPECT_LE(next - block.channel_begin, plan.block_channels);
    }
    EXPECT_EQ(next, 300);
  }
  EXPECT_THROW(plan_gather(with_kernel(6000, 1), tiles, 2, 2), std::invalid_argument);
}

}  // namespace
}  // namespace swat::cpu
