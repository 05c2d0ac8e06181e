// The choice of an instruction set: by name, by default, and what is said when it cannot be.
#include "kernels/cpu/dispatch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

namespace swat::cpu {
namespace {

std::string refusal(std::string_view wanted, const std::vector<Isa>& available) {
  try {
    choose(wanted, available, "SOURCE");
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no refusal";
}

// Leaves the choice, and the environment, as a fresh process has them.
class Dispatch : public testing::Test {
 protected:
  void TearDown() override {
    unsetenv("SWAT_CPU_ISA");
    force("auto");
  }
};

TEST(Choose, TakesTheNamedSet) {
  EXPECT_EQ(choose("portable", {Isa::portable, Isa::avx2, Isa::avx512}, "isa"), Isa::portable);
  EXPECT_EQ(choose("avx2", {Isa::portable, Isa::avx2, Isa::avx512}, "isa"), Isa::avx2);
  EXPECT_EQ(choose("avx512", {Isa::portable, Isa::avx2, Isa::avx512}, "isa"), Isa::avx512);
}

TEST(Choose, AutoIsTheFastestAvailable) {
  EXPECT_EQ(choose("auto", {Isa::portable}, "isa"), Isa::portable);
  EXPECT_EQ(choose("auto", {Isa::portable, Isa::avx2}, "isa"), Isa::avx2);
}

TEST(Choose, SaysWhatWasExpectedAndWhatCame) {
  EXPECT_EQ(refusal("sse9", {Isa::portable, Isa::avx2}),
            "SOURCE: expected one of auto, portable, avx2, got 'sse9', which is no instruction set of swat_ext");
  EXPECT_EQ(refusal("avx512", {Isa::portable, Isa::avx2}),
            "SOURCE: expected one of auto, portable, avx2, got 'avx512', which this processor does not support");
}

TEST(Choose, NamesAreExact) {
  for (const char* wanted : {"", "AVX2", "avx2 ", "avx"}) {
    EXPECT_NE(refusal(wanted, {Isa::portable, Isa::avx2}), "no refusal") << "for '" << wanted << "'";
  }
}

TEST(Supported, StartsPortableAndHasEachOnce) {
  std::vector<Isa> found = supported();
  ASSERT_FALSE(found.empty());
  EXPECT_EQ(found.front(), Isa::portable);
  std::sort(found.begin(), found.end());
  EXPECT_EQ(std::adjacent_find(found.begin(), found.end()), found.end());
}

TEST(Supported, WideVectorsComeLastUnlessTheProcessorHalvesThem) {
  const std::vector<Isa> found = supported();
  const auto at = [&](Isa isa) { return std::find(found.begin(), found.end(), isa) - found.begin(); };
  if (at(Isa::avx512) == static_cast<int64_t>(found.size())) GTEST_SKIP() << "no AVX-512";
  EXPECT_EQ(at(Isa::avx512vl) > at(Isa::avx512), static_cast<bool>(__builtin_cpu_is("amdfam19h")));
}

TEST_F(Dispatch, ForcesEachSupportedSet) {
  std::vector<const KernelTable*> tables;
  for (Isa isa : supported()) {
    force(name(isa));
    EXPECT_EQ(active_isa(), isa);
    for (const KernelTable* other : tables)
      EXPECT_NE(&active(), other) << "two sets share the kernels of " << name(isa);
    tables.push_back(&active());
  }
}

TEST_F(Dispatch, ARefusedNameChangesNothing) {
  force("portable");
  EXPECT_THROW(force("sse9"), std::invalid_argument);
  EXPECT_EQ(active_isa(), Isa::portable);
}

TEST_F(Dispatch, TheEnvironmentForcesASet) {
  setenv("SWAT_CPU_ISA", "portable", 1);
  force_from_environment();
  EXPECT_EQ(active_isa(), Isa::portable);
}

TEST_F(Dispatch, AnUnsetOrEmptyVariableMeansTheFastest) {
  force("portable");
  force_from_environment();
  EXPECT_EQ(active_isa(), supported().back());
  force("portable");
  setenv("SWAT_CPU_ISA", "", 1);
  force_from_environment();
  EXPECT_EQ(active_isa(), supported().back());
}

TEST_F(Dispatch, TheEnvironmentIsNamedInARefusal) {
  setenv("SWAT_CPU_ISA", "sse9", 1);
  try {
    force_from_environment();
    FAIL() << "accepted";
  } catch (const std::invalid_argument& error) {
    EXPECT_EQ(std::string(error.what()).rfind("SWAT_CPU_ISA: ", 0), 0) << error.what();
  }
}

}  // namespace
}  // namespace swat::cpu
