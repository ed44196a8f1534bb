// Attention of the tokens of one call over the filled part of a cache and over each other, under a mask.
//
// Positions are added in ascending order: those of the cache, then those of this call in their order, in which a
// node's ancestors stand before it. So it makes no difference to any bit whether a token's predecessors are cached or
// part of the call, nor what else is part of it: the weight of what a token does not see is exactly 0.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "product.h"

namespace msn_jax {

template <class T>
struct Attention {
  using D = Dot<T>;
  const T *q;                // [B, tokens, K, G, H]
  const T *k, *v;            // [B, K, tokens, H], of this call
  const bool* mask;          // [masks, tokens, tokens], masks 1 or B
  const T *past_k, *past_v;  // [B, K, slots, H]
  const int32_t* length;     // [B]: slots that are filled
  const int32_t* oldest;     // [B, tokens]: the first slot that a token sees, or null
  float* y;                  // [B, tokens, K, G, H]
  int64_t B, tokens, K, G, H, slots, masks;

  static constexpr int kRows = 4;     // rows, that is query heads of tokens, that run side by side
  static constexpr int kChunk = 32;   // most rows of one part of the work
  static constexpr int kVectors = 4;  // of keys that run side by side
  static constexpr int kBlock = 64;   // positions whose values are widened at one time
  static constexpr int kHeads = 4;    // vectors of a value that run side by side

  // Of the rows that share keys and values: of like length, and two where that leaves each kRows or more.
  int64_t chunks() const { return std::max((tokens * G + kChunk - 1) / kChunk, std::min<int64_t>(2, tokens * G / kRows)); }
  int64_t chunk() const { return ((tokens * G + chunks() - 1) / chunks() + kRows - 1) / kRows * kRows; }
  int64_t parts() const { return B * K * chunks(); }
  int64_t wide() const { return (H + kHeads * L - 1) / (kHeads * L) * kHeads * L; }

  // What a part's rows see: slots first .. end - 1 of the cache, then the tokens of the call.
  void run(int64_t part) const {
    const int64_t b = part / chunks() / K, head = part / chunks() % K;
    const int64_t top = part % chunks() * chunk(), count = std::min(chunk(), tokens * G - top);
    const int64_t end = std::clamp<int64_t>(length[b], 0, slots);
    int64_t first = 0;
    if (oldest) {
      const int32_t* of = oldest + b * tokens;
      first = std::clamp<int64_t>(*std::min_element(of + top / G, of + (top + count - 1) / G + 1), 0, end);
    }
    const int64_t cached = end - first, seen = cached + tokens, stride = (seen + L - 1) / L * L + L;
    const T *keys = k + (b * K + head) * tokens * H, *values = v + (b * K + head) * tokens * H;
    const T* past_keys = past_k + ((b * K + head) * slots + first) * H;
    const T* past_values = past_v + ((b * K + head) * slots + first) * H;

    auto head_of = [&](int64_t row) { return (((b * tokens + row / G) * K + head) * G + row % G) * H; };
    const int64_t packed = (H + D::kStep - 1) / D::kStep * D::kStep;
    std::vector<float> query(H), scores(kChunk * stride), out(kChunk * wide());
    std::vector<typename D::Packed> queries(kChunk * packed);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t h = 0; h < H; ++h) query[h] = to_float(q[head_of(top + r) + h]);
      pack_row<D>(query.data(), H, &queries[r * packed]);
    }
    look(past_keys, past_values, cached, queries.data(), packed, count, scores.data(), stride);
    look(keys, values, tokens, queries.data(), packed, count, scores.data() + cached, stride);
    for (int64_t r = 0; r < count; ++r) weigh(&scores[r * stride], b, (top + r) / G, first, cached, seen);

    const int64_t padded = (count + kRows - 1) / kRows * kRows;
    float totals[kChunk] = {};
    std::vector<float> wide_values(kBlock * wide());
    for (int64_t at = 0; at < cached; at += kBlock)
      gather(past_values + at * H, std::min<int64_t>(kBlock, cached - at), wide_values.data(), &scores[at], stride,
             padded, out.data(), totals);
    for (int64_t at = 0; at < tokens; at += kBlock)
      gather(values + at * H, std::min<int64_t>(kBlock, tokens - at), wide_values.data(), &scores[cached + at], stride,
             padded, out.data(), totals);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t h = 0; h < H; ++h) y[head_of(top + r) + h] = totals[r] == 0 ? 0 : out[r * wide() + h] / totals[r];
  }

  // The scores of `count` keys, with lanes for keys, and after them fewer than L numbers of no meaning.
  void look(const T* keys, const T* values, int64_t count, const typename D::Packed* queries, int64_t packed, int64_t rows,
            float* scores, int64_t stride) const {
    const int64_t unit = 4 / sizeof(T), units = packed / unit;  // L units of a key at a time
    std::vector<U> turned(kVectors * units);
    for (int64_t at = 0; at < count; at += kVectors * L) {
      const int vectors = std::min<int64_t>(kVectors, (count - at + L - 1) / L);
      for (int j = 0; j < vectors; ++j) {
        for (int64_t first = 0; first < units; first += L) {
          U block[L] = {};
          for (int64_t i = 0; i < std::min<int64_t>(L, count - at - j * L); ++i) {
            const int64_t here = (at + j * L + i) * H + first * unit;
            const T* from = keys + here;
            __builtin_prefetch(from + kVectors * L * H, 0, 2);  // of the next turn, and
            __builtin_prefetch(values + here, 0, 2);            // what `gather` reads next
            if (first * unit + D::kStep <= H) block[i] = load<U>(from);
            else std::memcpy(&block[i], from, (H - first * unit) * sizeof(T));
          }
          transpose(block);
          for (int i = 0; i < L; ++i) turned[(first + i) * kVectors + j] = block[i];
        }
      }
      for (int64_t r = 0; r < rows; r += kRows) {
        F sums[kRows][kVectors] = {};
        for (int64_t u = 0; u < units; ++u) {
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) {
            const typename D::Operand x = D::spread(queries + (r + i) * packed, u);
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j)
              sums[i][j] = D::add(sums[i][j], D::weight((const T*)&turned[u * kVectors + j]), x);
          }
        }
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j)  // by constants: sums that are indexed otherwise live in memory
            if (j < vectors) store(scores + (r + i) * stride + at + j * L, sums[i][j]);
        }
      }
    }
  }

  // A row's scores become weights, up to their sum; 0 where its token may not look.
  void weigh(float* row, int64_t b, int64_t token, int64_t first, int64_t cached, int64_t seen) const {
    const float never = -std::numeric_limits<float>::infinity();
    const bool* sees = mask + ((masks == 1 ? 0 : b) * tokens + token) * tokens;
    if (oldest) {
      const int64_t hidden = std::clamp<int64_t>(oldest[b * tokens + token] - first, 0, cached);
      std::fill(row, row + hidden, never);
    }
    for (int64_t i = 0; i < tokens; ++i)
      if (!sees[i]) row[cached + i] = never;
    std::fill(row + seen, row + (seen + L - 1) / L * L, never);
    F highest = fill(never);
    for (int64_t at = 0; at < seen; at += L) {
      const F here = load<F>(row + at);
      highest = here > highest ? here : highest;
    }
    float top = std::numeric_limits<float>::lowest();  // so that a token which sees nothing has no nan
    for (int l = 0; l < L; ++l) top = std::max(top, highest[l]);
    const float root = 1.0f / std::sqrt(float(H));
    for (int64_t at = 0; at < seen; at += L) store(row + at, exp((load<F>(row + at) - top) * root));
  }

  // Add up to kBlock values, times the rows' weights, to `out`, and the weights to `totals`.
  void gather(const T* values, int64_t count, float* widened, const float* weights, int64_t stride, int64_t rows,
              float* out, float* totals) const {
    const int64_t W = wide();
    for (int64_t p = 0; p < count; ++p)
      for (int64_t h = 0; h < W; h += L) store(widened + p * W + h, widen_some(values + p * H + h, H - h));
    for (int64_t r = 0; r < rows; r += kRows) {
      for (int64_t h = 0; h < W; h += kHeads * L) {
        F sums[kRows][kHeads];
        float sum_of[kRows];
        for (int i = 0; i < kRows; ++i) {
          sum_of[i] = totals[r + i];
          for (int j = 0; j < kHeads; ++j) sums[i][j] = load<F>(out + (r + i) * W + h + j * L);
        }
        for (int64_t p = 0; p < count; ++p) {
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) {
            const float weight = weights[(r + i) * stride + p];
            sum_of[i] += weight;
#pragma GCC unroll 4
            for (int j = 0; j < kHeads; ++j)
              sums[i][j] = fma(fill(weight), load<F>(widened + p * W + h + j * L), sums[i][j]);
          }
        }
        for (int i = 0; i < kRows; ++i) {
          if (h + kHeads * L >= W) totals[r + i] = sum_of[i];  // once, not for each part of a value
          for (int j = 0; j < kHeads; ++j) store(out + (r + i) * W + h + j * L, sums[i][j]);
        }
      }
    }
  }
};

}  // namespace msn_jax
