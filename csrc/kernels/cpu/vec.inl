// SIMD for one instruction set: included inside that set's namespace and target region, never on its own.
//
// The including file defines SWAT_VECTOR_BYTES (16, 32 or 64), SWAT_REGISTERS (vector registers to plan accumulators for) and
// SWAT_INTRINSICS (0 none, 256 AVX2, 512 AVX-512). Arithmetic is
// written with the compiler's vector types, so a body built with 64-byte vectors also runs, split in halves, on a machine without
// AVX-512: that is how the tests reach it everywhere. Intrinsics stand only where the vector types have no word for the operation.

inline constexpr int kVectorBytes = SWAT_VECTOR_BYTES;

template <typename T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

inline constexpr int kRegisters = SWAT_REGISTERS;

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = float __attribute__((vector_size(kVectorBytes)));
  using unaligned = float __attribute__((vector_size(kVectorBytes), aligned(4)));
  using part = float __attribute__((vector_size(16)));
  using unaligned_part = float __attribute__((vector_size(16), aligned(4)));
};
template <>
struct VectorOf<double> {
  using type = double __attribute__((vector_size(kVectorBytes)));
  using unaligned = double __attribute__((vector_size(kVectorBytes), aligned(8)));
  using part = double __attribute__((vector_size(16)));
  using unaligned_part = double __attribute__((vector_size(16), aligned(8)));
};
template <typename T>
using Vec = typename VectorOf<T>::type;

template <typename T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <typename T>
inline Vec<T> load_unaligned(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <typename T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<Vec<T>*>(p) = v;
}
template <typename T>
inline void store_unaligned(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}
// A broadcast: x - 0 is x for every x, NaN and -0 included, so the compiler emits no arithmetic.
template <typename T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// ---- Transposes of kLanes x kLanes elements ---------------------------------------------------------------------------------
//
// A vector is cut in 16-byte parts. Part l of rows i, i + E, i + 2E, ... (E elements a part) is gathered into one vector, and E of
// those are transposed inside their parts, which gives E finished rows: no shuffle ever crosses a part.

template <typename T, typename Row>
inline Vec<T> load_parts(Row&& row, int first, int64_t column) {
  using Part = typename VectorOf<T>::unaligned_part;
  constexpr int kPart = 16 / sizeof(T);
  auto part = [&](int q) ->
      typename VectorOf<T>::part { return *reinterpret_cast<const Part*>(row(first + q * kPart) + column); };
  if constexpr (kVectorBytes == 16) {
    return part(0);
  } else if constexpr (kVectorBytes == 32) {
    if constexpr (sizeof(T) == 4) {
      return __builtin_shufflevector(part(0), part(1), 0, 1, 2, 3, 4, 5, 6, 7);
    } else {
      return __builtin_shufflevector(part(0), part(1), 0, 1, 2, 3);
    }
  } else {
    if constexpr (sizeof(T) == 4) {
      const auto low = __builtin_shufflevector(part(0), part(1), 0, 1, 2, 3, 4, 5, 6, 7);
      const auto high = __builtin_shufflevector(part(2), part(3), 0, 1, 2, 3, 4, 5, 6, 7);
      return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    } else {
      const auto low = __builtin_shufflevector(part(0), part(1), 0, 1, 2, 3);
      const auto high = __builtin_shufflevector(part(2), part(3), 0, 1, 2, 3);
      return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
    }
  }
}

// Interleave pairs (32 or 64 bits) of the low or high half of every 16-byte part of a and b.
template <int kBytes, bool kHigh, typename T>
inline Vec<T> interleave(Vec<T> a, Vec<T> b) {
  using Index = std::conditional_t<sizeof(T) == 4, int32_t __attribute__((vector_size(kVectorBytes))),
                                   int64_t __attribute__((vector_size(kVectorBytes)))>;
  constexpr int kN = kLanes<T>;
  constexpr int kPart = 16 / sizeof(T);
  constexpr int kRun = kBytes / sizeof(T);  // consecutive elements taken from one operand
  Index index;
  for (int i = 0; i < kN; ++i) {
    const int within = i % kPart;
    const int run = within / kRun;  // runs alternate between a and b
    const int from = (i - within) + (run / 2) * kRun + within % kRun + (kHigh ? kPart / 2 : 0);
    index[i] = from + (run % 2 ? kN : 0);
  }
  return __builtin_shuffle(a, b, index);
}

// dst(r)[k] = src(k)[r] for r, k in [0, kLanes), where src and dst give the address of a row; every dst row is written whole.
template <typename T, typename Source, typename Target>
inline void transpose(Source&& src, Target&& dst) {
  constexpr int kPart = 16 / sizeof(T);
#pragma GCC unroll 4
  for (int column = 0; column < kLanes<T>; column += kPart) {
    if constexpr (sizeof(T) == 4) {
      const Vec<T> a = load_parts<T>(src, 0, column), b = load_parts<T>(src, 1, column);
      const Vec<T> c = load_parts<T>(src, 2, column), d = load_parts<T>(src, 3, column);
      const Vec<T> ab_low = interleave<4, false, T>(a, b), ab_high = interleave<4, true, T>(a, b);
      const Vec<T> cd_low = interleave<4, false, T>(c, d), cd_high = interleave<4, true, T>(c, d);
      store_unaligned(dst(column + 0), interleave<8, false, T>(ab_low, cd_low));
      store_unaligned(dst(column + 1), interleave<8, true, T>(ab_low, cd_low));
      store_unaligned(dst(column + 2), interleave<8, false, T>(ab_high, cd_high));
      store_unaligned(dst(column + 3), interleave<8, true, T>(ab_high, cd_high));
    } else {
      const Vec<T> a = load_parts<T>(src, 0, column), b = load_parts<T>(src, 1, column);
      store_unaligned(dst(column + 0), interleave<8, false, T>(a, b));
      store_unaligned(dst(column + 1), interleave<8, true, T>(a, b));
    }
  }
}

// ---- Selection of the elements that stay ------------------------------------------------------------------------------------

// Bit i is set where element i stays: not below the threshold in magnitude (NaN stays), and not exactly zero.
template <typename T>
inline uint32_t kept_bits(Vec<T> v, T threshold) {
#if SWAT_INTRINSICS == 512
  if constexpr (sizeof(T) == 4) {
    const __m512 x = reinterpret_cast<__m512>(v);
    const __mmask16 not_below = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(threshold), _CMP_NLT_UQ);
    return _mm512_mask_cmp_ps_mask(not_below, x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  } else {
    const __m512d x = reinterpret_cast<__m512d>(v);
    const __mmask8 not_below = _mm512_cmp_pd_mask(_mm512_abs_pd(x), _mm512_set1_pd(threshold), _CMP_NLT_UQ);
    return _mm512_mask_cmp_pd_mask(not_below, x, _mm512_setzero_pd(), _CMP_NEQ_UQ);
  }
#elif SWAT_INTRINSICS == 256
  if constexpr (sizeof(T) == 4) {
    const __m256 x = reinterpret_cast<__m256>(v);
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
    const __m256 not_below = _mm256_cmp_ps(magnitude, _mm256_set1_ps(threshold), _CMP_NLT_UQ);
    return _mm256_movemask_ps(_mm256_and_ps(not_below, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_UQ)));
  } else {
    const __m256d x = reinterpret_cast<__m256d>(v);
    const __m256d magnitude = _mm256_andnot_pd(_mm256_set1_pd(-0.0), x);
    const __m256d not_below = _mm256_cmp_pd(magnitude, _mm256_set1_pd(threshold), _CMP_NLT_UQ);
    return _mm256_movemask_pd(_mm256_and_pd(not_below, _mm256_cmp_pd(x, _mm256_setzero_pd(), _CMP_NEQ_UQ)));
  }
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<T>; ++i) {
    const bool kept = !(std::abs(v[i]) < threshold) && v[i] != 0;
    bits |= static_cast<uint32_t>(kept) << i;
  }
  return bits;
#endif
}

#if SWAT_INTRINSICS == 256
// Row m lists the positions of the set bits of m: the permutation that moves those elements to the front.
struct CompressTable {
  alignas(64) uint8_t row[256][8];
  constexpr CompressTable() : row{} {
    for (int m = 0; m < 256; ++m) {
      int count = 0;
      for (int i = 0; i < 8; ++i) {
        if (m >> i & 1) row[m][count++] = static_cast<uint8_t>(i);
      }
    }
  }
};
inline constexpr CompressTable kCompressTable;
#endif

// Write the elements of v whose bit is set to dst, in order; may write a whole vector.
template <typename T>
inline void store_kept(T* dst, Vec<T> v, uint32_t bits) {
#if SWAT_INTRINSICS == 512
  // Compress in a register, then store: compressing straight to memory is microcoded on Zen 4.
  if constexpr (sizeof(T) == 4) {
    _mm512_storeu_ps(dst, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), reinterpret_cast<__m512>(v)));
  } else {
    _mm512_storeu_pd(dst, _mm512_maskz_compress_pd(static_cast<__mmask8>(bits), reinterpret_cast<__m512d>(v)));
  }
#elif SWAT_INTRINSICS == 256
  if constexpr (sizeof(T) == 4) {
    const __m128i row = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompressTable.row[bits]));
    _mm256_storeu_ps(dst, _mm256_permutevar8x32_ps(reinterpret_cast<__m256>(v), _mm256_cvtepu8_epi32(row)));
  } else {
    for (; bits != 0; bits &= bits - 1) *dst++ = v[__builtin_ctz(bits)];
  }
#else
  for (; bits != 0; bits &= bits - 1) *dst++ = v[__builtin_ctz(bits)];
#endif
}
