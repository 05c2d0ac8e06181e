// Which instruction set the CPU kernels run on: chosen once from the processor's features, or forced by name.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace swat::cpu {

struct KernelTable;

// The sets that kernels are built for.
//   portable  what the compiler targets by default
//   avx2      avx2, fma, bmi, bmi2, lzcnt, popcnt
//   avx512    those of avx2, and avx512f, avx512bw, avx512dq, avx512vl
//   avx512vl  the same features, in vectors of 32 bytes
enum class Isa { portable, avx2, avx512, avx512vl };

// One table a set, defined in the file of the set's name.
extern const KernelTable portable_table;
#if defined(__x86_64__)
extern const KernelTable avx2_table;
extern const KernelTable avx512_table;
extern const KernelTable avx512vl_table;
#endif

// The set's name, as SWAT_CPU_ISA spells it.
const char* name(Isa isa);

// The sets that this processor and its operating system can run, the slowest on it first; never empty.
std::vector<Isa> supported();

// The set called `wanted`, or the last of `available` if it is "auto". `source` names where the request came from.
// Throws std::invalid_argument, saying the source, what it may be and what it was, if `wanted` is none of `available`.
Isa choose(std::string_view wanted, const std::vector<Isa>& available, std::string_view source);

// Use the set called `isa` ("auto": the fastest) in every call from now on; throws as choose() does.
void force(const std::string& isa);

// Use what the environment variable SWAT_CPU_ISA asks for, "auto" if it is unset or empty; throws as choose() does.
void force_from_environment();

// The set in use, and its kernels. A caller that keeps the reference keeps one set, whatever another thread forces.
Isa active_isa();
const KernelTable& active();

}  // namespace swat::cpu
