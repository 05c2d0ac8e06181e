#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <utility>

namespace swat::cpu {
namespace {

constexpr const char* kVariable = "SWAT_CPU_ISA";

struct Set {
  Isa isa;
  const char* name;
  const KernelTable* table;
  bool (*runs_here)();
};

#if defined(__x86_64__)
// The compiler's run-time library also asks whether the operating system saves the wide registers.
bool runs_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("popcnt");
}

bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Zen 4: of that family it alone has AVX-512, and its adders are 32 bytes wide.
bool halves_wide_vectors() { return __builtin_cpu_is("amdfam19h"); }
#else
bool halves_wide_vectors() { return false; }
#endif

constexpr Set kSets[] = {
    {Isa::portable, "portable", &portable_table, [] { return true; }},
#if defined(__x86_64__)
    {Isa::avx2, "avx2", &avx2_table, runs_avx2},
    {Isa::avx512, "avx512", &avx512_table, runs_avx512},
    {Isa::avx512vl, "avx512vl", &avx512vl_table, runs_avx512},
#endif
};

// Names outlive the build: a set that this architecture lacks is unsupported, not unknown.
constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512vl"};

const Set& set_of(Isa isa) {
  return *std::find_if(std::begin(kSets), std::end(kSets), [isa](const Set& set) { return set.isa == isa; });
}

// Null until someone asks: static initialisers of other files may run kernels before this file's would.
std::atomic<const Set*> current{nullptr};

const Set& current_set() {
  const Set* set = current.load(std::memory_order_acquire);
  if (set == nullptr) {
    const Set* fastest = &set_of(supported().back());
    // If force() came first, `set` becomes what it chose.
    if (current.compare_exchange_strong(set, fastest, std::memory_order_acq_rel)) set = fastest;
  }
  return *set;
}

}  // namespace

const char* name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<Isa> supported() {
  std::vector<Isa> found;
  for (const Set& set : kSets) {
    if (set.runs_here()) found.push_back(set.isa);
  }
  if (found.back() == Isa::avx512vl && !halves_wide_vectors()) std::swap(found.end()[-1], found.end()[-2]);
  return found;
}

Isa choose(std::string_view wanted, const std::vector<Isa>& available, std::string_view source) {
  if (wanted == "auto") return available.back();
  std::string expected = "auto";
  for (Isa isa : available) {
    if (wanted == name(isa)) return isa;
    expected.append(", ").append(name(isa));
  }
  const bool known = std::find(std::begin(kNames), std::end(kNames), wanted) != std::end(kNames);
  std::string message(source);
  message.append(": expected one of ").append(expected).append(", got '").append(wanted).append("'");
  message.append(known ? ", which this processor does not support" : ", which is no instruction set of swat_ext");
  throw std::invalid_argument(message);
}

void force(const std::string& isa) {
  current.store(&set_of(choose(isa, supported(), "isa")), std::memory_order_release);
}

void force_from_environment() {
  const char* wanted = std::getenv(kVariable);
  const bool unset = wanted == nullptr || *wanted == '\0';
  current.store(&set_of(choose(unset ? "auto" : wanted, supported(), kVariable)), std::memory_order_release);
}

Isa active_isa() { return current_set().isa; }

const KernelTable& active() { return *current_set().table; }

}  // namespace swat::cpu
