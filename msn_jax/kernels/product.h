// y[rows, out] = x[rows, in] w[out, in] for few rows: the weights are read once, whatever the rows.
//
// Every (row, out) sum has one order: lane by lane along `in`, then the lanes by `fold`. A tile only says which sums
// run side by side. A low-rank adapter adds two more products at some rows; the others keep their bits.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "vector.h"

namespace msn_jax {

// How weights of type W multiply: a row of x is packed once a call, see `pack_row`; an Operand holds `kStep` of its
// elements, or of a weight row's, or L times the same 4 bytes of x, a unit.
template <class W>
struct Dot {  // float32
  using Packed = float;
  using Operand = F;
  using Sum = F;
  static constexpr int kStep = L;
  static constexpr int64_t kExact = INT64_MAX / 2;  // terms of one sum
  static void pack(const float* x, float* out) { std::memcpy(out, x, sizeof(F)); }
  static Operand row(const float* x) { return load<F>(x); }
  static Operand spread(const float* x, int64_t unit) { return fill(x[unit]); }
  static Operand weight(const W* w) { return load<F>(w); }
  static F add(F total, Operand w, Operand x) { return fma(w, x, total); }
};

template <>
struct Dot<bf16> {
#if defined(__AVX512BF16__)
  using Packed = bf16;
  using Operand = __m512bh;
  using Sum = F;
  static constexpr int kStep = 2 * L;
  static constexpr int64_t kExact = INT64_MAX / 2;
  static void pack(const float* x, bf16* out) {
    for (int i = 0; i < kStep; ++i) out[i] = round_bf16(x[i]);
  }
  static Operand row(const bf16* x) { return load<Operand>(x); }
  static Operand spread(const bf16* x, int64_t unit) { return (Operand)(I{} + load<int32_t>(x + 2 * unit)); }
  static Operand weight(const bf16* w) { return load<Operand>(w); }
  static F add(F total, Operand w, Operand x) { return (F)_mm512_dpbf16_ps((__m512)total, w, x); }
#else
  using Packed = float;
  struct Operand {
    F even, odd;
  };
  using Sum = F;
  static constexpr int kStep = 2 * L;
  static constexpr int64_t kExact = INT64_MAX / 2;
  static void pack(const float* x, float* out) {
    for (int i = 0; i < kStep; ++i) out[i / 2 + i % 2 * L] = to_float(round_bf16(x[i]));
  }
  static Operand row(const float* x) { return {load<F>(x), load<F>(x + L)}; }
  static Operand spread(const float* x, int64_t unit) {
    x += unit / L * kStep + unit % L;
    return {fill(x[0]), fill(x[L])};
  }
  static Operand weight(const bf16* w) {
    const U pairs = load<U>(w);  // a shift and a mask widen both halves of each
    return {(F)(pairs << 16), (F)(pairs & 0xFFFF0000)};
  }
  static F add(F total, Operand w, Operand x) { return fma(w.odd, x.odd, fma(w.even, x.even, total)); }
#endif
};

// int8: x becomes integers as well, of 14 bits, by the largest number of its row. Their sums are exact, so that they
// have the same bits in any order and with every instruction set.
template <>
struct Dot<int8_t> {
  using Packed = int16_t;
  using Operand = I;  // pairs of int16
  using Sum = I;
  static constexpr int kStep = 2 * L, kLevels = 8191;
  static constexpr int64_t kExact = 2048;  // terms of a sum that fits into 32 bits: 2048 * 8191 * 127 < 2^31
  static Operand row(const int16_t* x) { return load<I>(x); }
#if defined(__AVX512F__)
  static Operand weight(const int8_t* w) { return (I)_mm512_cvtepi8_epi16(load<__m256i>(w)); }
#if defined(__AVX512VNNI__)
  static I add(I total, I w, I x) { return (I)_mm512_dpwssd_epi32((__m512i)total, (__m512i)w, (__m512i)x); }
#else
  static I add(I total, I w, I x) { return total + (I)_mm512_madd_epi16((__m512i)w, (__m512i)x); }
#endif
#elif defined(__AVX2__)
  static Operand weight(const int8_t* w) { return (I)_mm256_cvtepi8_epi16(load<__m128i>(w)); }
  static I add(I total, I w, I x) { return total + (I)_mm256_madd_epi16((__m256i)w, (__m256i)x); }
#else
  static Operand weight(const int8_t* w) {
    int16_t wide[kStep];
    for (int i = 0; i < kStep; ++i) wide[i] = w[i];
    return load<I>(wide);
  }
  static I add(I total, I w, I x) { return total + (w << 16 >> 16) * (x << 16 >> 16) + (w >> 16) * (x >> 16); }
#endif
};

// A row of x, zeros beyond it up to a whole number of steps; what its numbers are to be multiplied by.
template <class D>
float pack_row(const float* x, int64_t in, typename D::Packed* to) {
  if constexpr (std::is_same_v<typename D::Sum, F>) {
    for (int64_t k = 0; k < in; k += D::kStep) {
      if (k + D::kStep <= in) {
        D::pack(x + k, to + k);
        continue;
      }
      float last[D::kStep] = {};
      std::memcpy(last, x + k, (in - k) * sizeof(float));
      D::pack(last, to + k);
    }
    return 1;
  } else {
    F highest{}, broken{};
    for (int64_t k = 0; k < in; k += L) {
      const F here = widen_some(x + k, in - k), size = here < 0 ? -here : here;
      highest = size > highest ? size : highest;
      broken += here * 0;  // nan where a number is none, or infinite
    }
    float top = 0;
    for (int l = 0; l < L; ++l) top = std::max(top, highest[l]);
    const F inverse = fill(top > 1e-30f ? D::kLevels / top : 0);
    for (int64_t k = 0; k < in; k += L) {
      const I rounded = round_to_int(widen_some(x + k, in - k) * inverse);
      for (int l = 0; l < L; ++l) to[k + l] = rounded[l];
    }
    return top / D::kLevels + sum(broken);
  }
}

constexpr auto kOnesThenZeros = [] {
  std::array<uint8_t, 128> bytes{};
  for (int i = 0; i < 64; ++i) bytes[i] = 255;
  return bytes;
}();

// All rows, or the last few of each `tokens`: where the i-th of them stands.
struct Rows {
  int64_t last = 1, tokens = 1;
  int64_t at(int64_t i) const { return i / last * tokens + tokens - last + i % last; }
};

template <class W>
struct Product {
  using D = Dot<W>;
  const W* w;                     // [out, in]
  const float* scale;             // [out] of int8, or null
  float* y;                       // its `out_rows` are [rows, out]
  int64_t rows = 0, in = 0, out = 0;
  bool adds = false;              // to what y holds
  Rows out_rows = {};
  int64_t padded = 0;             // `in` up to a whole number of steps
  std::vector<typename D::Packed> x = {};  // [rows rounded up to 4, padded], zero beyond [rows, in]
  std::vector<float> x_scale = {};         // [rows rounded up to 4], of int8
  std::vector<float*> y_rows = {};         // [rows]

  void pack(const float* from, Rows from_rows) {
    padded = (in + D::kStep - 1) / D::kStep * D::kStep;
    x.resize((rows + 3) / 4 * 4 * padded);
    x_scale.resize((rows + 3) / 4 * 4);
    y_rows.resize(rows);
    for (int64_t row = 0; row < rows; ++row) {
      x_scale[row] = pack_row<D>(from + from_rows.at(row) * in, in, x.data() + row * padded);
      y_rows[row] = y + out_rows.at(row) * out;
    }
  }

  // The last step of a row of w, zeros beyond it.
  void last_step(const W* from, int64_t count, W* to) const {
    if (from + D::kStep > w + out * in) {
      std::memcpy(to, from, count * sizeof(W));
      return;
    }
    // Read into the next row and cut off: a copy of any number of bytes would take longer than the step.
    typedef uint8_t Bytes __attribute__((vector_size(D::kStep * sizeof(W))));
    store(to, load<Bytes>(from) & load<Bytes>(kOnesThenZeros.data() + 64 - count * sizeof(W)));
  }

  // L sums: X rows of x, from `row` on, by L / X rows of w, from `first` on.
  template <int X>
  __attribute__((always_inline)) void tile(int64_t first, int64_t row) const {
    constexpr int R = L / X;
    const W* ws[R];
    // Beyond the last row of w the last one again: it is computed and not stored.
    for (int r = 0; r < R; ++r) ws[r] = w + std::min(first + r, out - 1) * in;
    const typename D::Packed* xs = x.data() + row * padded;
    F folded{};
    int64_t k = 0;
    do {
      typename D::Sum sums[L] = {};
      const int64_t stop = std::min(in, k + D::kExact);
      for (; k + D::kStep <= stop; k += D::kStep) {
        typename D::Operand xk[X];
#pragma GCC unroll 16
        for (int i = 0; i < X; ++i) xk[i] = D::row(xs + i * padded + k);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          // Rows of two tiles on or more, into the second cache: a row is too short for the processor to foresee them,
          // and in the first they would take the room of x.
          __builtin_prefetch(ws[r] + k + std::max(2 * R, L) * in, 0, 2);
          const typename D::Operand wk = D::weight(ws[r] + k);
#pragma GCC unroll 16
          for (int i = 0; i < X; ++i) sums[i * R + r] = D::add(sums[i * R + r], wk, xk[i]);
        }
      }
      if (k < stop) {
        for (int r = 0; r < R; ++r) {
          W rest[D::kStep] = {};
          last_step(ws[r] + k, in - k, rest);
          const typename D::Operand wk = D::weight(rest);
          for (int i = 0; i < X; ++i) sums[i * R + r] = D::add(sums[i * R + r], wk, D::row(xs + i * padded + k));
        }
        k = stop;
      }
      folded += to_float(fold(sums));
    } while (k < in);
    if constexpr (std::is_same_v<W, int8_t>) {
      F by;
      for (int i = 0; i < L; ++i) by[i] = x_scale[row + i / R] * scale[std::min(first + i % R, out - 1)];
      folded *= by;
    }
    float results[L];
    store(results, folded);
    for (int i = 0; i < X && row + i < rows; ++i) {
      float *to = y_rows[row + i] + first, *from = results + i * R;
      if (!adds && first + R <= out) {
        std::memcpy(to, from, R * sizeof(float));  // of a known size: one store
        continue;
      }
      for (int r = 0; r < std::min<int64_t>(R, out - first); ++r) to[r] = adds ? to[r] + from[r] : from[r];
    }
  }

  // All rows by the rows first .. end - 1 of w; `first` is a multiple of L.
  void run(int64_t first, int64_t end) const {
    const int64_t kRows = 64;  // of x at one time: they stay in the cache beside a block of w
    for (int64_t top = 0; top < rows; top += kRows) {
      const int64_t stop = std::min(rows, top + kRows), left = (stop - top) % 4;
      for (int64_t block = first; block < end; block += L) {
        const int64_t last = std::min(end, block + L), whole = stop - (left == 3 ? 0 : left);
        for (int64_t row = top; row < whole; row += 4)
          for (int64_t at = block; at < last; at += L / 4) tile<4>(at, row);
        if (left == 2)
          for (int64_t at = block; at < last; at += L / 2) tile<2>(at, whole);
        if (left == 1) tile<1>(block, whole);
      }
    }
  }
};

}  // namespace msn_jax
