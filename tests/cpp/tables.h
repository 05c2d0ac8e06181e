// What every kernel test runs over: each instruction set of this machine, and everywhere wide vectors and many registers.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <ostream>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/table.h"
#include "wide.h"

namespace swat::cpu {

struct NamedTable {
  std::string name;
  const KernelTable* table;
};

inline void PrintTo(const NamedTable& table, std::ostream* out) { *out << table.name; }

inline std::vector<NamedTable> tables() {
  std::vector<NamedTable> found{{"wide", &wide_table}, {"many_registers", &many_registers_table}};
  for (Isa isa : supported()) {
    const KernelTable* table = &portable_table;
#if defined(__x86_64__)
    if (isa == Isa::avx2) table = &avx2_table;
    if (isa == Isa::avx512) table = &avx512_table;
    if (isa == Isa::avx512vl) table = &avx512vl_table;
#endif
    found.push_back({name(isa), table});
  }
  return found;
}

// `threads` real threads, each with an even share.
inline Parallel threads(int64_t count) {
  return {[count](int64_t tasks, int64_t, const std::function<void(int64_t, int64_t)>& body) {
            const int64_t used = std::min(tasks, count);
            std::vector<std::thread> pool;
            for (int64_t i = 1; i < used; ++i) pool.emplace_back(body, tasks * i / used, tasks * (i + 1) / used);
            body(0, tasks / used);
            for (std::thread& thread : pool) thread.join();
          },
          count};
}

class TableTest : public testing::TestWithParam<NamedTable> {
 protected:
  const KernelTable& table() const { return *GetParam().table; }
};

inline std::string table_name(const testing::TestParamInfo<NamedTable>& info) { return info.param.name; }

}  // namespace swat::cpu
