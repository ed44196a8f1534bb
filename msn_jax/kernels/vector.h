// One vector type, as wide as the instruction set that this file is compiled for, and what the kernels do with it.
//
// The build compiles the same sources once an instruction set. Everything is written in the compiler's vector
// extensions; intrinsics stand only where those have no word for an instruction: fused multiply-add, and products of
// bfloat16. -ffp-contract=off keeps the compiler from fusing a multiplication and an addition in one place and not in
// another, so that a sum has the same bits wherever it is computed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace msn_jax {

#if defined(__AVX512F__)
constexpr int L = 16;  // lanes of a vector
#else
constexpr int L = 8;  // two registers where a register has 16 bytes
#endif

typedef float F __attribute__((vector_size(4 * L)));
typedef int32_t I __attribute__((vector_size(4 * L)));
typedef uint32_t U __attribute__((vector_size(4 * L)));

using bf16 = uint16_t;  // its bits: the upper half of a float32

template <class V, class T>
inline V load(const T* at) {
  V v;
  std::memcpy(&v, at, sizeof v);
  return v;
}

template <class V, class T>
inline void store(T* at, V v) {
  std::memcpy(at, &v, sizeof v);
}

inline F fill(float x) { return x - F{}; }  // (0 + x would be an addition, since it is not -0 for x = -0)

// a * b + c, rounded once where the machine can.
inline F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  float32x4_t halves[3][2];
  std::memcpy(halves[0], &a, sizeof a);
  std::memcpy(halves[1], &b, sizeof b);
  std::memcpy(halves[2], &c, sizeof c);
  for (int i = 0; i < 2; ++i) halves[2][i] = vfmaq_f32(halves[2][i], halves[0][i], halves[1][i]);
  return load<F>(halves[2]);
#else
  return a * b + c;
#endif
}

// L consecutive numbers as float32. (gcc converts vectors of other lengths one number at a time.)
inline F widen(const float* at) { return load<F>(at); }
#if defined(__AVX512F__)
inline F widen(const bf16* at) { return (F)((U)_mm512_cvtepu16_epi32(load<__m256i>(at)) << 16); }
#elif defined(__AVX2__)
inline F widen(const bf16* at) { return (F)((U)_mm256_cvtepu16_epi32(load<__m128i>(at)) << 16); }
#else
inline F widen(const bf16* at) {
  U wide;
  for (int l = 0; l < L; ++l) wide[l] = uint32_t(at[l]) << 16;
  return (F)wide;
}
#endif

// The first `count` numbers, zeros after them; nothing is read beyond them.
template <class T>
inline F widen_some(const T* at, int64_t count) {
  if (count >= L) return widen(at);
  T padded[L] = {};
  if (count > 0) std::memcpy(padded, at, count * sizeof(T));
  return widen(padded);
}

// To the nearest bfloat16, ties to even.
inline bf16 round_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded;  // a nan stays one
}

// Lanes of a and b by index, those of b counted from L on.
template <int... index, class V>
inline V pick(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index...);
#else
  return __builtin_shuffle(a, b, I{index...});
#endif
}

// Two vectors' lanes, by pairs of blocks of n lanes: the first blocks of both, the second ones, and so on.
template <int n, class V, int... l>
inline V first_halves(V a, V b, std::integer_sequence<int, l...>) {
  return pick<(l & n ? L + (l ^ n) : l)...>(a, b);
}
template <int n, class V, int... l>
inline V second_halves(V a, V b, std::integer_sequence<int, l...>) {
  return pick<(l & n ? L + l : l ^ n)...>(a, b);
}
constexpr auto kLanes = std::make_integer_sequence<int, L>();

// Lane i of the result is the sum of the lanes of a[i]; every one in the same order.
template <int n = L / 2, class V>
inline V fold(V* a) {
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) a[i] = first_halves<n>(a[i], a[i + n], kLanes) + second_halves<n>(a[i], a[i + n], kLanes);
  if constexpr (n > 1) return fold<n / 2>(a);
  return a[0];
}

// Lane i of a[l] becomes lane l of a[i].
template <int n = L / 2, class V>
inline void transpose(V* a) {
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (i & n) continue;
    const V first = first_halves<n>(a[i], a[i + n], kLanes);
    a[i + n] = second_halves<n>(a[i], a[i + n], kLanes);
    a[i] = first;
  }
  if constexpr (n > 1) transpose<n / 2>(a);
}

// The sum of the lanes, in order.
inline float sum(F a) {
  float total = 0;
  for (int l = 0; l < L; ++l) total += a[l];
  return total;
}

// To the nearest integer, ties to even, of numbers up to 2^22: adding 1.5 * 2^23 rounds.
inline I round_to_int(F x) { return (I)(x + 12582912.0f) - (I)fill(12582912.0f); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline F to_float(F x) { return x; }
inline F to_float(I x) { return __builtin_convertvector(x, F); }

// e^x for x <= 0 to about one unit in the last place; 0 below -87, where float32 leaves its normal range.
// Cephes' expf: a power of two times a polynomial of what is left.
inline F exp(F x) {
  const F low = fill(-87.0f);
  const F clamped = x < low ? low : x;
  const F magic = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F n = (clamped * 1.44269504f + magic) - magic;
  F r = fma(n, fill(-0.693359375f), clamped);
  r = fma(n, fill(2.12194440e-4f), r);
  F p = fill(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fma(p, r, fill(c));
  p = fma(p, r * r, r) + 1.0f;
  const F power = (F)((__builtin_convertvector(n, I) + 127) << 23);
  return x < low ? F{} : p * power;
}

// Numbers below the normal range count as zero while this lives, on whichever thread: XLA's are not all set alike.
struct FlushDenormals {
#if defined(__SSE__)
  unsigned before = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(before | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before); }
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

}  // namespace msn_jax
