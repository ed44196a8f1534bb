// The custom calls: what they check, and how they share their work out. The maths is in the headers.

#include <atomic>
#include <functional>
#include <memory>

#include "attention.h"
#include "product.h"
#include "vector.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using namespace msn_jax;
using Any = ffi::AnyBuffer;

// part(0) to part(count - 1), on the caller and on XLA's threads, whoever is free taking the next one. Neighbours in time
// are `each` apart, so that a thread goes on mostly with what it has read ahead.
static ffi::Future run_parts(ffi::ThreadPool& pool, int64_t count, std::function<void(int64_t)> part) {
  struct Shared {
    std::function<void(int64_t)> part;
    int64_t count, threads, each;
    std::atomic<int64_t> next{0}, left;
    ffi::Promise done;
  };
  auto shared = std::make_shared<Shared>();
  shared->part = std::move(part);
  shared->count = count;
  shared->threads = std::clamp<int64_t>(pool.num_threads(), 1, std::max<int64_t>(1, count));
  shared->each = (count + shared->threads - 1) / shared->threads;
  shared->left = shared->threads * shared->each;
  ffi::Future future(shared->done);
  if (count == 0) shared->done.SetAvailable();
  auto work = [shared] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < shared->threads * shared->each;) {
      const int64_t part = i % shared->threads * shared->each + i / shared->threads;
      if (part < shared->count) {
        FlushDenormals here;
        shared->part(part);
      }
      // XLA may go on with the program inside this, on this thread.
      if (shared->left.fetch_sub(1) == 1) shared->done.SetAvailable();
    }
  };
  for (int64_t i = shared->threads; i > 1; --i) {
    auto copy = work;
    pool.Schedule(std::move(copy));
  }
  work();
  return future;
}

// What a call says of arguments that it does not take, before it reads them.
struct Wrong {
  const char* what;
  operator ffi::Error() const { return ffi::Error::InvalidArgument(what); }
  operator ffi::Future() const {
    ffi::Promise promise;
    ffi::Future future(promise);
    promise.SetError(*this);
    return future;
  }
};

using Shape = std::vector<int64_t>;

static bool is(const Any& buffer, ffi::DataType type, const Shape& shape) {
  const auto dims = buffer.dimensions();
  return buffer.element_type() == type && std::equal(dims.begin(), dims.end(), shape.begin(), shape.end());
}

// The sizes of a buffer of n axes; of any other -1, which no buffer has.
template <int n>
static std::array<int64_t, n> sizes(const Any& buffer) {
  std::array<int64_t, n> sizes;
  sizes.fill(-1);
  const auto dims = buffer.dimensions();
  if (dims.size() == n) std::copy(dims.begin(), dims.end(), sizes.begin());
  return sizes;
}

template <class T>
static T* data(const Any& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

// ---- y = x w, and scale * (x a) b added to the last rows of each `tokens`

struct LowRank {
  const void *a, *b;  // [rank, in] and [out, rank], of the type of w, bfloat16 beside int8
  int64_t rank;
  Rows rows;
  float scale;
};

template <class W>
static ffi::Future product_of(ffi::ThreadPool& pool, Product<W> p, const float* x, const LowRank& low) {
  using A = std::conditional_t<std::is_same_v<W, int8_t>, bf16, W>;
  p.pack(x, {});
  Product<A> up{static_cast<const A*>(low.b), nullptr, p.y};
  if (low.rank > 0 && low.rows.last > 0) {
    FlushDenormals here;
    const int64_t rows = p.rows / low.rows.tokens * low.rows.last;
    std::vector<float> hidden(rows * low.rank);
    Product<A> down{static_cast<const A*>(low.a), nullptr, hidden.data(), rows, p.in, low.rank};
    down.pack(x, low.rows);
    down.run(0, low.rank);
    for (float& h : hidden) h *= low.scale;
    up = {up.w, nullptr, p.y, rows, low.rank, p.out, true, low.rows};
    up.pack(hidden.data(), {});
  }
  // About twelve parts a thread, so that none waits long for the last; each a whole number of blocks of L.
  const int64_t blocks = (p.out + L - 1) / L;
  const int64_t each = std::max<int64_t>(1, blocks / std::max<int64_t>(1, 12 * pool.num_threads()));
  const int64_t count = p.rows ? (blocks + each - 1) / each : 0;
  return run_parts(pool, count, [p = std::move(p), up = std::move(up), each](int64_t i) {
    const int64_t first = i * each * L, end = std::min(p.out, (i + 1) * each * L);
    p.run(first, end);
    up.run(first, end);
  });
}

static ffi::Future product(ffi::ThreadPool pool, Any x, Any w, Any scale, Any a, Any b, ffi::Result<Any> y,
                           float low_rank_scale, int64_t last, int64_t tokens) {
  const auto [rows, in] = sizes<2>(x);
  const int64_t out = sizes<2>(w)[0], rank = sizes<2>(a)[0];
  const ffi::DataType type = w.element_type(), low_type = type == ffi::S8 ? ffi::BF16 : type;
  if (!is(x, ffi::F32, {rows, in}) || !is(w, type, {out, in}) || !is(scale, ffi::F32, {type == ffi::S8 ? out : 0}))
    return Wrong{"product: x is float32 [rows, in], w [out, in], scale float32 [out] for int8 and else [0]"};
  if (!is(a, low_type, {rank, in}) || !is(b, low_type, {out, rank}) || !is(*y, ffi::F32, {rows, out}))
    return Wrong{"product: a is [rank, in] and b [out, rank] of the type of w, y float32 [rows, out]"};
  if (tokens < 1 || rows % tokens || last < 0 || last > tokens) return Wrong{"product: rows are in groups of `tokens`"};
  const float* scales = type == ffi::S8 ? data<float>(scale) : nullptr;
  const LowRank low = {a.untyped_data(), b.untyped_data(), rank, {last, tokens}, low_rank_scale};
  auto of = [&, rows = rows, in = in](auto* weights) {
    using W = std::remove_pointer_t<decltype(weights)>;
    return product_of<W>(pool, {weights, scales, data<float>(*y), rows, in, out}, data<float>(x), low);
  };
  if (type == ffi::F32) return of(data<float>(w));
  if (type == ffi::BF16) return of(data<bf16>(w));
  if (type == ffi::S8) return of(data<int8_t>(w));
  return Wrong{"product: w is float32, bfloat16 or int8"};
}

// ---- attention

static ffi::Future attention(ffi::ThreadPool pool, Any q, Any k, Any v, Any mask, Any past_k, Any past_v, Any length,
                             Any oldest, ffi::Result<Any> y) {
  const auto [B, T, K, G, H] = sizes<5>(q);
  const int64_t S = sizes<4>(past_k)[2], masks = sizes<3>(mask)[0];
  const bool window = oldest.dimensions().size() == 2;
  const ffi::DataType type = q.element_type();
  if (H < 1 || (type != ffi::F32 && type != ffi::BF16) || !is(k, type, {B, K, T, H}) || !is(v, type, {B, K, T, H}))
    return Wrong{"attention: q is [B, T, K, G, H], k and v [B, K, T, H], all float32 or all bfloat16"};
  if (!is(past_k, type, {B, K, S, H}) || !is(past_v, type, {B, K, S, H}) || !is(length, ffi::S32, {B}))
    return Wrong{"attention: the cache is twice [B, K, S, H] of the type of q, length int32 [B]"};
  if ((masks != 1 && masks != B) || !is(mask, ffi::PRED, {masks, T, T}))
    return Wrong{"attention: mask is bool [1 or B, T, T]"};
  if (!is(oldest, ffi::S32, window ? Shape{B, T} : Shape{0}) || !is(*y, ffi::F32, {B, T, K, G, H}))
    return Wrong{"attention: oldest is int32 [B, T] or [0], y float32 of the shape of q"};
  auto of = [&, B = B, T = T, K = K, G = G, H = H](auto* as) {
    using E = std::remove_pointer_t<decltype(as)>;
    const Attention<E> a = {data<E>(q), data<E>(k), data<E>(v), data<bool>(mask), data<E>(past_k), data<E>(past_v),
                            data<int32_t>(length), window ? data<int32_t>(oldest) : nullptr, data<float>(*y),
                            B, T, K, G, H, S, masks};
    return run_parts(pool, T ? a.parts() : 0, [a](int64_t i) { a.run(i); });
  };
  return type == ffi::F32 ? of((float*)nullptr) : of((bf16*)nullptr);
}

// ---- norm: over the last axis of x [rows, D], row i scaled by row i % M of scale [M, D]

template <class W>
static void norm_rows(const float* x, const W* scale, const W* bias, float* y, int64_t rows, int64_t D, int64_t M,
                      float eps) {
  FlushDenormals here;
  for (int64_t row = 0; row < rows; ++row, x += D, y += D) {
    const W* by = scale + row % M * D;
    F total{}, squares{};
    if (bias)
      for (int64_t i = 0; i < D; i += L) total += widen_some(x + i, D - i);
    const F mean = fill(sum(total) / D);
    for (int64_t i = 0; i < D; i += L) {
      F centred = widen_some(x + i, D - i) - mean;
      for (int64_t l = D - i; l < L; ++l) centred[l] = 0;
      squares = fma(centred, centred, squares);
    }
    const F factor = fill(1.0f / std::sqrt(sum(squares) / D + eps));
    for (int64_t i = 0; i < D; i += L) {
      F one = (widen_some(x + i, D - i) - mean) * factor * widen_some(by + i, D - i);
      if (bias) one = one + widen_some(bias + row % M * D + i, D - i);
      std::memcpy(y + i, &one, std::min<int64_t>(L, D - i) * sizeof(float));
    }
  }
}

static ffi::Error norm(Any x, Any scale, Any bias, ffi::Result<Any> y, float eps) {
  const auto [rows, D] = sizes<2>(x);
  const int64_t M = sizes<2>(scale)[0];
  const ffi::DataType type = scale.element_type();
  const bool biased = bias.dimensions().size() == 2;
  if (!is(x, ffi::F32, {rows, D}) || !is(*y, ffi::F32, {rows, D}) || M < 1 || !is(scale, type, {M, D}) ||
      !is(bias, type, biased ? Shape{M, D} : Shape{0}))
    return Wrong{"norm: x and y are float32 [rows, D], scale is [M, D], bias as scale or [0]"};
  auto of = [&, rows = rows, D = D](auto* s) {
    using W = std::remove_pointer_t<decltype(s)>;
    norm_rows<W>(data<float>(x), s, biased ? data<W>(bias) : nullptr, data<float>(*y), rows, D, M, eps);
    return ffi::Error::Success();
  };
  if (type == ffi::F32) return of(data<float>(scale));
  if (type == ffi::BF16) return of(data<bf16>(scale));
  return Wrong{"norm: scale is float32 or bfloat16"};
}

// ---- rope angles: one call of the C library for each number, whatever the number of positions

static ffi::Error angles(Any positions, Any frequencies, ffi::Result<Any> cos, ffi::Result<Any> sin) {
  const int64_t n = positions.element_count(), half = frequencies.element_count();
  if (!is(positions, ffi::S32, {n}) || !is(frequencies, ffi::F32, {half}) || !is(*cos, ffi::F32, {n, half}) ||
      !is(*sin, ffi::F32, {n, half}))
    return Wrong{"angles: int32 [n] and float32 [half] give twice float32 [n, half]"};
  for (int64_t i = 0; i < n * half; ++i) {
    const float angle = float(data<int32_t>(positions)[i / half]) * data<float>(frequencies)[i % half];
    data<float>(*cos)[i] = std::cos(angle);
    data<float>(*sin)[i] = std::sin(angle);
  }
  return ffi::Error::Success();
}

// ---- best: where the largest number of each row stands first

static ffi::Future best(ffi::ThreadPool pool, Any x, ffi::Result<Any> y) {
  const auto [n, V] = sizes<2>(x);
  if (V < 1 || !is(x, ffi::F32, {n, V}) || !is(*y, ffi::S32, {n})) return Wrong{"best: float32 [n, V] gives int32 [n]"};
  const float* rows = data<float>(x);
  int32_t* first = data<int32_t>(*y);
  return run_parts(pool, n, [=, V = V](int64_t i) {
    const float* row = rows + i * V;
    F highest = fill(row[0]);
    for (int64_t at = 0; at + L <= V; at += L) {
      const F here = load<F>(row + at);
      highest = here > highest ? here : highest;
    }
    float top = row[0];
    for (int l = 0; l < L; ++l) top = std::max(top, highest[l]);
    for (int64_t at = V / L * L; at < V; ++at) top = std::max(top, row[at]);
    first[i] = std::find(row, row + V, top) - row;
    if (first[i] == V) first[i] = 0;  // nothing but nan
  });
}

// ---- store_rows: rows [B, K, E, H] into a cache [B, K, S, H] from slot at[b] on, in the cache's own memory

static ffi::Error store_rows(Any cache, Any rows, Any at, ffi::Result<Any> y) {
  const auto [B, K, S, H] = sizes<4>(cache);
  const int64_t E = sizes<4>(rows)[2];
  const ffi::DataType type = cache.element_type();
  if (E > S || !is(rows, type, {B, K, E, H}) || !is(*y, type, {B, K, S, H}) || !is(at, ffi::S32, {B}))
    return Wrong{"store_rows: rows [B, K, E, H] of the type of cache [B, K, S, H], E <= S; at int32 [B]"};
  const int64_t bytes = ffi::ByteWidth(type) * H;
  if (data<char>(*y) != data<char>(cache)) std::memcpy(data<char>(*y), data<char>(cache), cache.size_bytes());
  for (int64_t i = 0; i < B * K; ++i) {
    const int64_t first = std::clamp<int64_t>(data<int32_t>(at)[i / K], 0, S - E);
    std::memcpy(data<char>(*y) + (i * S + first) * bytes, data<char>(rows) + i * E * bytes, E * bytes);
  }
  return ffi::Error::Success();
}

#define EXPORTED extern "C" __attribute__((visibility("default")))
#define CALL(name, ...)                                                            \
  EXPORTED XLA_FFI_Error* msn_jax_##name(XLA_FFI_CallFrame* frame) {                \
    static auto* handler = ffi::Ffi::Bind() __VA_ARGS__.To(name).release();         \
    return handler->Call(frame);                                                    \
  }
#define POOL .Ctx<ffi::ThreadPool>()
#define IN .Arg<Any>()
#define OUT .Ret<Any>()

CALL(product, POOL IN IN IN IN IN OUT.Attr<float>("low_rank_scale").Attr<int64_t>("last").Attr<int64_t>("tokens"))
CALL(attention, POOL IN IN IN IN IN IN IN IN OUT)
CALL(norm, IN IN IN OUT.Attr<float>("eps"))
CALL(angles, IN IN OUT OUT)
CALL(best, POOL IN OUT)
CALL(store_rows, IN IN IN OUT)

// The instruction set of this machine among those that the build knows; asked of the portable library.
EXPORTED const char* msn_jax_machine() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) return "avx512bf16";
  if (avx512) return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "portable";
}
