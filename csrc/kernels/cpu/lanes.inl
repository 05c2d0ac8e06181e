// Between the lanes of a vector and what is smaller than a lane: bits of a mask, bytes. Included inside an instruction set's namespace
// and target region.

// Integers as wide as T, one a lane.
template <typename T>
struct LanesOf;
template <>
struct LanesOf<float> {
  using type = int32_t __attribute__((vector_size(kVectorBytes)));
};
template <>
struct LanesOf<double> {
  using type = int64_t __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Lanes = typename LanesOf<T>::type;

// Bit i is set where element i is above zero or NaN: where a ReLU lets the gradient pass.
template <typename T>
inline uint32_t passing_bits(Vec<T> v) {
#if SWAT_INTRINSICS == 512
  if constexpr (sizeof(T) == 4) {
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(v), _mm512_setzero_ps(), _CMP_NLE_UQ);
  } else {
    return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(v), _mm512_setzero_pd(), _CMP_NLE_UQ);
  }
#elif SWAT_INTRINSICS == 256
  if constexpr (sizeof(T) == 4) {
    return _mm256_movemask_ps(_mm256_cmp_ps(reinterpret_cast<__m256>(v), _mm256_setzero_ps(), _CMP_NLE_UQ));
  } else {
    return _mm256_movemask_pd(_mm256_cmp_pd(reinterpret_cast<__m256d>(v), _mm256_setzero_pd(), _CMP_NLE_UQ));
  }
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<T>; ++i) bits |= static_cast<uint32_t>(!(v[i] <= 0)) << i;
  return bits;
#endif
}

// v where bit i is set, 0 elsewhere; bits from kLanes on do not matter.
template <typename T>
inline Vec<T> where_bits(Vec<T> v, uint32_t bits) {
  Lanes<T> bit;
  for (int i = 0; i < kLanes<T>; ++i) bit[i] = 1 << i;
  const Lanes<T> chosen = ((static_cast<int32_t>(bits) - Lanes<T>{}) & bit) == bit;
  return reinterpret_cast<Vec<T>>(reinterpret_cast<Lanes<T>>(v) & chosen);
}

// kLanes unsigned bytes, one a lane. (Of the AVX-512 conversions GCC warns without a mask.)
template <typename T>
inline Lanes<T> load_bytes(const uint8_t* p) {
#if SWAT_INTRINSICS == 512
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<Lanes<T>>(
        _mm512_maskz_cvtepu8_epi32(0xFFFF, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  } else {
    return reinterpret_cast<Lanes<T>>(
        _mm512_maskz_cvtepu8_epi64(0xFF, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
#elif SWAT_INTRINSICS == 256
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<Lanes<T>>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  } else {
    return reinterpret_cast<Lanes<T>>(_mm256_cvtepu8_epi64(_mm_loadu_si32(p)));
  }
#else
  Lanes<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = p[i];
  return v;
#endif
}

// The lowest byte of each lane, one after the other.
template <typename T>
inline void store_bytes(uint8_t* p, Lanes<T> v) {
#if SWAT_INTRINSICS == 512
  if constexpr (sizeof(T) == 4) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(0xFFFF, reinterpret_cast<__m512i>(v)));
  } else {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_maskz_cvtepi64_epi8(0xFF, reinterpret_cast<__m512i>(v)));
  }
#elif SWAT_INTRINSICS == 256
  const __m256i whole = reinterpret_cast<__m256i>(v);
  const __m128i low = _mm256_castsi256_si128(whole), high = _mm256_extracti128_si256(whole, 1);
  if constexpr (sizeof(T) == 4) {
    const __m128i lowest = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i bytes = _mm_unpacklo_epi32(_mm_shuffle_epi8(low, lowest), _mm_shuffle_epi8(high, lowest));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
  } else {
    const __m128i lowest = _mm_setr_epi8(0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    _mm_storeu_si32(p, _mm_unpacklo_epi16(_mm_shuffle_epi8(low, lowest), _mm_shuffle_epi8(high, lowest)));
  }
#else
  for (int i = 0; i < kLanes<T>; ++i) p[i] = static_cast<uint8_t>(v[i]);
#endif
}
