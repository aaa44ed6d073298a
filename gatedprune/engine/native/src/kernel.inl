// The indexed implicit GEMM, written once and compiled for each instruction set.
//
// Pixels are the vector operand, packed into aligned panels of up to MAX_NV vectors, a block of K_BLOCK rows (input
// channel and tap) at a time so that the block stays in the caches. Each weight is a scalar, broadcast from
// where it lies: row out[r], column columns[k]. No weight is copied, so that choosing channels costs nothing.
//
// The including file defines GP_NS, GP_TARGET, GP_LANES and GP_MAX_NV and the row tiles GP_TILE_1 … GP_TILE_4.
// With GP_PARTIAL it has parts of vectors of its own, with GP_MULTIPLY_ADD the product that tiles add up.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "layer.h"

#if defined(__clang__)
#define GP_UNROLL _Pragma("clang loop unroll(full)")
#else
#define GP_UNROLL _Pragma("GCC unroll 16")
#endif
#define GP_INLINE GP_TARGET static inline __attribute__((always_inline))
// function<nv>(…) of so many vectors.
#if GP_MAX_NV > 2
#define GP_OF_WIDTH(nv, function, ...)              \
  ((nv) == 1   ? function<1>(__VA_ARGS__)           \
   : (nv) == 2 ? function<2>(__VA_ARGS__)           \
   : (nv) == 3 ? function<3>(__VA_ARGS__)           \
               : function<4>(__VA_ARGS__))
#else
#define GP_OF_WIDTH(nv, function, ...) ((nv) == 1 ? function<1>(__VA_ARGS__) : function<2>(__VA_ARGS__))
#endif

namespace gatedprune {
namespace GP_NS {

constexpr int L = GP_LANES;
constexpr int64_t K_BLOCK = 256;
// A group of panels shares each weight while it is in the cache, and reads and writes longer runs of pixels: how many panels,
// as so many pixels at most.
constexpr int64_t PANEL = GP_MAX_NV * L;
constexpr int64_t LEAST_GROUP = 256 / PANEL, MIDDLE_GROUP = 384 / PANEL, MAX_GROUP = std::max<int64_t>(16, 512 / PANEL);

typedef float V __attribute__((vector_size(GP_LANES * 4)));
typedef float VU __attribute__((vector_size(GP_LANES * 4), aligned(4), may_alias));
typedef int32_t M __attribute__((vector_size(GP_LANES * 4)));

GP_INLINE V load(const float* p) { return *reinterpret_cast<const VU*>(p); }
GP_INLINE void store(float* p, V v) { *reinterpret_cast<VU*>(p) = v; }
GP_INLINE V splat(float s) { return s - V{}; }
GP_INLINE V vmax(V a, V b) { return a > b ? a : b; }
GP_INLINE V vmin(V a, V b) { return a < b ? a : b; }
// NaN wins, as in PyTorch's pooling.
GP_INLINE V vmax_nan(V a, V b) { return (a > b) | (a != a) ? a : b; }
GP_INLINE V vabs(V a) { return (V)((M)a & 0x7fffffff); }
GP_INLINE float hsum(V a) {
  float s[4] = {0, 0, 0, 0};
  for (int i = 0; i < L; i += 4)
    for (int j = 0; j < 4; j++) s[j] += a[i + j];
  return (s[0] + s[1]) + (s[2] + s[3]);
}
#ifndef GP_PARTIAL
// Lanes [from, to), which need not be any; loaded over what is there, or with zeros for the others.
typedef M Lanes;
GP_INLINE Lanes lanes_between(int64_t from, int64_t to) {
  Lanes m;
  for (int64_t i = 0; i < L; i++) m[i] = i >= from && i < to ? -1 : 0;
  return m;
}
GP_INLINE V load_over(V x, const float* p, Lanes m) { return m ? load(p) : x; }
GP_INLINE V load_lanes(const float* p, Lanes m) {
  V v = V{};
  for (int64_t i = 0; i < L; i++)
    if (m[i]) v[i] = p[i];
  return v;
}
// The first n values, the others are zero; n < L but for loads.
GP_INLINE V load_part(const float* p, int64_t n) {
  V v = V{};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
}
GP_INLINE void store_part(float* p, V v, int64_t n) { std::memcpy(p, &v, n * sizeof(float)); }
GP_INLINE V keep_part(V v, int64_t n) { return load_part(reinterpret_cast<const float*>(&v), n); }
// Lanes [from, to), which need not be any; p is where the first lane of the vector would lie.
struct Span {
  int64_t from, to;
};
GP_INLINE Span span(int64_t from, int64_t to) { return {from, std::max(from, to)}; }
GP_INLINE void copy_span(float* to, const float* from, Span s) {
  std::memcpy(to + s.from, from + s.from, (s.to - s.from) * sizeof(float));
}
GP_INLINE V load_span(V x, const float* p, Span s) {
  copy_span(reinterpret_cast<float*>(&x), p, s);
  return x;
}
GP_INLINE void store_span(float* p, V v, Span s) { copy_span(p, reinterpret_cast<const float*>(&v), s); }
GP_INLINE V keep_span(V v, Span s) { return load_span(V{}, reinterpret_cast<const float*>(&v), s); }
#endif

GP_INLINE Lanes lanes_from(int64_t lane) { return lanes_between(lane, L); }

// Lane i is lane 2i, or 2i + 1 if ODD, of a and b, one after the other.
template <int ODD>
GP_INLINE V every_other(V a, V b) {
#if defined(__clang__)
  V y;
  for (int i = 0; i < L; i++) y[i] = i < L / 2 ? a[2 * i + ODD] : b[2 * i + ODD - L];
  return y;
#else
  M from;
  for (int i = 0; i < L; i++) from[i] = 2 * i + ODD;
  return __builtin_shuffle(a, b, from);
#endif
}

// Blocks of 4 × 4 for turning tokens into columns and back.
typedef float Q __attribute__((vector_size(16)));
typedef float QU __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__clang__)
#define GP_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t QM __attribute__((vector_size(16)));
#define GP_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, QM{i, j, k, l})
#endif
// to[j * pitch + i] = from i[j] for i, j < 4.
GP_INLINE void transpose4(const float* from0, const float* from1, const float* from2, const float* from3, float* to,
                          int64_t to_pitch) {
  const Q a = *(const QU*)from0, b = *(const QU*)from1, c = *(const QU*)from2, d = *(const QU*)from3;
  const Q ab = GP_SHUFFLE(a, b, 0, 4, 1, 5), cd = GP_SHUFFLE(c, d, 0, 4, 1, 5);
  const Q AB = GP_SHUFFLE(a, b, 2, 6, 3, 7), CD = GP_SHUFFLE(c, d, 2, 6, 3, 7);
  *(QU*)to = GP_SHUFFLE(ab, cd, 0, 1, 4, 5);
  *(QU*)(to + to_pitch) = GP_SHUFFLE(ab, cd, 2, 3, 6, 7);
  *(QU*)(to + 2 * to_pitch) = GP_SHUFFLE(AB, CD, 0, 1, 4, 5);
  *(QU*)(to + 3 * to_pitch) = GP_SHUFFLE(AB, CD, 2, 3, 6, 7);
}
GP_INLINE void transpose(const float* from, int64_t rows, int64_t columns, int64_t from_pitch, float* to,
                         int64_t to_pitch) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) {
      const float* at = from + i * from_pitch + j;
      transpose4(at, at + from_pitch, at + 2 * from_pitch, at + 3 * from_pitch, to + j * to_pitch + i, to_pitch);
    }
    for (; j < columns; j++)
      for (int64_t k = i; k < i + 4; k++) to[j * to_pitch + k] = from[k * from_pitch + j];
  }
  for (; i < rows; i++)
    for (int64_t j = 0; j < columns; j++) to[j * to_pitch + i] = from[i * from_pitch + j];
}

// exp(x) to about 1 ulp for |x| < 87; beyond that clamped, which silu does not see.
GP_INLINE V vexp(V x) {
  x = vmin(vmax(x, splat(-87.f)), splat(87.f));
  const V magic = splat(12582912.f);  // 1.5 * 2^23: rounds to the nearest integer
  V n = (x * 1.44269504088896341f + magic);
  M bits = (M)n;
  n = n - magic;
  V r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  M scale = (bits - 0x4B400000 + 127) << 23;
  return p * (V)scale;
}

// x times the normal distribution function. erfc by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
GP_INLINE V gelu(V x) {
  const V z = vabs(x) * 0.70710678118654752f;
  const V t = 1.f / (1.f + 0.3275911f * z);
  V p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  // Less than exp(-80) vanishes beside x, and a denormal number takes a hundred cycles.
  const V tail = 0.5f * p * t * vexp(vmax(-z * z, splat(-80.f)));
  return x * (x < V{} ? tail : 1.f - tail);
}

// NaN stays NaN, as in PyTorch.
GP_INLINE V activate(V v, Activation a) {
  const V zero = V{};
  switch (a) {
    case Activation::relu:
      return v < zero ? zero : v;
    case Activation::relu6: {
      V w = v < zero ? zero : v;
      return w > splat(6.f) ? splat(6.f) : w;
    }
    case Activation::hardswish: {
      V w = v + 3.f;
      w = w < zero ? zero : w;
      w = w > splat(6.f) ? splat(6.f) : w;
      return v * w * (1.f / 6.f);
    }
    case Activation::silu: {
      V y = v / (1.f + vexp(-v));
      return v != v ? v : y;
    }
    case Activation::gelu: {
      V y = gelu(v);
      return v != v ? v : y;
    }
    default:
      return v;
  }
}

// One decision for all of them: none waits for another's.
template <int N>
GP_INLINE void activate_all(V* v, Activation a) {
#define GP_ALL(name)                                                                         \
  case Activation::name:                                                                     \
    GP_UNROLL for (int i = 0; i < N; i++) v[i] = activate(v[i], Activation::name);           \
    break;
  switch (a) {
    GP_ALL(relu)
    GP_ALL(relu6)
    GP_ALL(hardswish)
    GP_ALL(silu)
    GP_ALL(gelu)
    case Activation::none:
      break;
  }
#undef GP_ALL
}

// n floats, of whole vectors, in their place.
GP_INLINE void activate_run(float* x, int64_t n, Activation a) {
  if (a == Activation::none) return;
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) activate_all<4>((V*)(x + i), a);
  for (; i < n; i += L) *(V*)(x + i) = activate(*(const V*)(x + i), a);
}

// The row of the weight that row r of the layer is.
GP_INLINE int64_t row_number(const Layer& l, int64_t r) { return l.out ? l.out[r] : l.first_row + r; }

GP_INLINE const float* row_of(const Layer& l, int64_t r) {
  return l.weight + (l.gathered >= 0 ? l.gathered + r : row_number(l, r)) * l.ldw;
}

// What a tile fetches for later ones: some lines of the cache, then those `step` bytes further, at every fourth of the
// first `columns`. A few at a time do not hold up what the tile itself reads.
struct Fetch {
  const char* at = nullptr;
  int64_t columns = 0, step = 0;
  int lines = 0;
};

// Where a tile's rows go once their sums are complete: row r of the layer, pixels from n0, and |y| to `sums` if not null.
struct Goal {
  const Layer* layer;
  int64_t r, n0;
  float* sums;
  Fetch fetch;
  const char* later;  // or null: a line of it for every four columns
};

#ifdef GP_PAIRS
// The including file defines `dot` and `pair`, and weights are pairs of neighbours in a row.
constexpr int64_t PAIR = 2;
GP_INLINE V multiply_add(V a, V x, V s) { return dot(a, x, s); }
// Bits, since as one number a pair may be denormal, or a NaN.
GP_INLINE V weight(const float* p) {
  int32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return (V)(bits - M{});
}
// Rows 2i and 2i + 1 of a panel, side by side in row i; the last one beside zeros if there is no other.
GP_INLINE void pair_rows(float* panel, int64_t rows, int64_t width) {
  for (int64_t k = 0; k < rows; k += 2)
    for (int64_t i = 0; i < width; i += L) {
      const float* from = panel + k * width + i;
      *(V*)(panel + k / 2 * width + i) = pair(*(const V*)from, k + 1 < rows ? *(const V*)(from + width) : V{});
    }
}
#else
constexpr int64_t PAIR = 1;
#ifndef GP_MULTIPLY_ADD
GP_INLINE V multiply_add(V a, V x, V s) { return a + s * x; }
#endif
GP_INLINE V weight(const float* p) { return splat(*p); }
GP_INLINE void pair_rows(float*, int64_t, int64_t) {}
#endif

constexpr int cache_lines(int64_t floats) { return int((floats + 15) / 16); }

// What a tile of n columns fetches of it, and the next tile the rest.
GP_INLINE const char* take(Range& ahead, int64_t n) {
  const char* at = ahead.begin < ahead.end ? ahead.begin : nullptr;
  ahead.begin += n * 16;
  return at;
}

// Panels that are packed later: `width` pixels of each plane, and then those beside them.
struct PixelsAhead {
  const float* x = nullptr;
  int64_t plane = 0, planes = 0, panels = 0, width = 0, k = 0;
  GP_TARGET Fetch take(int64_t n) {
    const Fetch f{reinterpret_cast<const char*>(x + k * plane), n, plane * 4, cache_lines(width)};
    k += n / 4;
    if (k >= planes) k = 0, x += width, panels--;
    return f;
  }
};

// a[r][v] += w[r][q] * x[v].
template <int R, int NV>
GP_INLINE void step(const float* const* w, int64_t q, const float* panel, V (*a)[NV]) {
  V x[NV];
  GP_UNROLL for (int v = 0; v < NV; v++) x[v] = *(const V*)(panel + v * L);
  GP_UNROLL for (int r = 0; r < R; r++) {
    const V s = weight(w[r] + q);
    GP_UNROLL for (int v = 0; v < NV; v++) a[r][v] = multiply_add(a[r][v], x[v], s);
  }
}

// acc[r][v] (+)= sum over k of weight[r][column k] * panel[k][v]. FINISH: these are the last k, and what follows the sums
// is done while they are in registers, but for activations that are no bounds. It adds up sums of K_BLOCK products: of a single
// long one the rounding errors would grow with its length.
//
// Weights come from memory, in runs too short for the hardware to foresee: meanwhile the rows `ahead` are fetched, which
// the next tile will read at `ahead_columns`, and what the goal names: nothing of it waits for the others.
template <int R, int NV, bool FINISH>
GP_TARGET static void tile(const float* const* rows, const int32_t* columns, int64_t n, const float* panel, float* acc,
                           bool first, const float* const* ahead, const int32_t* ahead_columns, const Goal& goal) {
  V a[R][NV];
  const float* w[R];
  GP_UNROLL for (int r = 0; r < R; r++) w[r] = rows[r];
  const char *soon = goal.fetch.at, *later = goal.later;
  int64_t k = 0;
  do {
    GP_UNROLL for (int r = 0; r < R; r++)
      GP_UNROLL for (int v = 0; v < NV; v++) a[r][v] = V{};
    const int64_t end = std::min(n, k + K_BLOCK);
    for (; k + 4 <= end; k += 4, panel += 4 * NV * L) {
      if (k < goal.fetch.columns) {
        for (int i = 0; i < goal.fetch.lines; i++) __builtin_prefetch(soon + 64 * i, 0, 2);
        soon += goal.fetch.step;
      }
      if (later) __builtin_prefetch(later + k * 16, 0, 2);
      if (ahead) {
        const int64_t next = ahead_columns[k];
        GP_UNROLL for (int r = 0; r < R; r++) __builtin_prefetch(ahead[r] + next);
      }
      GP_UNROLL for (int i = 0; i < 4; i++) step<R, NV>(w, columns[k + i], panel + i * NV * L, a);
    }
    for (; k < end; k++, panel += NV * L) step<R, NV>(w, columns[k], panel, a);
    if (!first)
      GP_UNROLL for (int r = 0; r < R; r++)
        GP_UNROLL for (int v = 0; v < NV; v++) a[r][v] += *(const V*)(acc + (r * NV + v) * L);
    if (FINISH && k == n) break;
    GP_UNROLL for (int r = 0; r < R; r++)
      GP_UNROLL for (int v = 0; v < NV; v++) *(V*)(acc + (r * NV + v) * L) = a[r][v];
    first = false;
  } while (k < n);
  if (!FINISH) return;
  // One decision for all of the tile, and nothing of the layer read again after a store, which might have changed it.
  const Layer l = *goal.layer;
  const int64_t n0 = goal.n0, live = std::min<int64_t>(L, l.pixels - n0 - (NV - 1) * L);  // of the last vector
  float* sums = goal.sums;
  // Last, since sums that began with it would lose what is small beside it.
  if (l.bias)
    GP_UNROLL for (int r = 0; r < R; r++) {
      const V bias = splat(l.bias[row_number(l, goal.r + r)]);
      GP_UNROLL for (int v = 0; v < NV; v++) a[r][v] += bias;
    }
  if (l.gain)
    GP_UNROLL for (int r = 0; r < R; r++) {
      const V gain = splat(l.gain[goal.r + r]);
      GP_UNROLL for (int v = 0; v < NV; v++) a[r][v] *= gain;
    }
  if (l.residual) {
    const float* from = l.residual + goal.r * l.ldy + n0;
    GP_UNROLL for (int r = 0; r < R; r++) {
      GP_UNROLL for (int v = 0; v < NV - 1; v++) a[r][v] += load(from + r * l.ldy + v * L);
      const float* end = from + r * l.ldy + (NV - 1) * L;
      a[r][NV - 1] += live == L ? load(end) : load_part(end, live);
    }
  }
  if (l.activation != Activation::none)  // NaN stays NaN
    GP_UNROLL for (int r = 0; r < R; r++)
      GP_UNROLL for (int v = 0; v < NV; v++) a[r][v] = a[r][v] < V{} ? V{} : a[r][v];
  if (l.activation == Activation::relu6)
    GP_UNROLL for (int r = 0; r < R; r++)
      GP_UNROLL for (int v = 0; v < NV; v++) a[r][v] = a[r][v] > splat(6.f) ? splat(6.f) : a[r][v];
  float* to = l.y + goal.r * l.ldy + n0;
  GP_UNROLL for (int r = 0; r < R; r++) {
    GP_UNROLL for (int v = 0; v < NV - 1; v++) store(to + r * l.ldy + v * L, a[r][v]);
    float* end = to + r * l.ldy + (NV - 1) * L;
    if (live == L)
      store(end, a[r][NV - 1]);
    else
      store_part(end, a[r][NV - 1], live);
  }
  if (sums)
    GP_UNROLL for (int r = 0; r < R; r++) {
      V total = *(const V*)(sums + r * L) + vabs(live == L ? a[r][NV - 1] : keep_part(a[r][NV - 1], live));
      GP_UNROLL for (int v = 0; v < NV - 1; v++) total += vabs(a[r][v]);
      *(V*)(sums + r * L) = total;
    }
}

typedef void (*Tile)(const float* const*, const int32_t*, int64_t, const float*, float*, bool, const float* const*,
                     const int32_t*, const Goal&);

template <bool FINISH, int NV, int R>
struct Tiles {
  static void fill(Tile* to) {
    to[R] = &tile<R, NV, FINISH>;
    Tiles<FINISH, NV, R - 1>::fill(to);
  }
};
template <bool FINISH, int NV>
struct Tiles<FINISH, NV, 0> {
  static void fill(Tile*) {}
};

constexpr int TILE_ROWS[5] = {0, GP_TILE_1, GP_TILE_2, GP_TILE_3, GP_TILE_4};
constexpr int64_t TILE_VECTORS = std::max({TILE_ROWS[1], 2 * TILE_ROWS[2], 3 * TILE_ROWS[3], 4 * TILE_ROWS[4]});
constexpr int64_t STEP = 24;  // a multiple of each
static_assert(STEP % GP_TILE_1 == 0 && STEP % GP_TILE_2 == 0, "tiles of all heights end together");
#if GP_MAX_NV > 2
static_assert(STEP % GP_TILE_3 == 0 && STEP % GP_TILE_4 == 0, "tiles of all heights end together");
#endif

struct TileTable {
  Tile of[2][5][17];  // finishing or not, vectors, rows
  TileTable() {
    fill<false>(of[0]);
    fill<true>(of[1]);
  }
  template <bool FINISH>
  static void fill(Tile (*to)[17]) {
    Tiles<FINISH, 1, GP_TILE_1>::fill(to[1]);
    Tiles<FINISH, 2, GP_TILE_2>::fill(to[2]);
#if GP_MAX_NV > 2
    Tiles<FINISH, 3, GP_TILE_3>::fill(to[3]);
    Tiles<FINISH, 4, GP_TILE_4>::fill(to[4]);
#endif
  }
};

// Where the lanes of each vector of a panel come from: a map row ends inside a vector, so that a vector is put together
// from several loads, each aligned to the lanes that it fills.
struct Piece {
  int64_t offset;
  Lanes lanes;
};
struct Gather {
  int64_t begin[5];
  Piece piece[4 * (GP_LANES + 1)];
};

GP_INLINE void plan(const Layer& l, int64_t n0, int nv, Gather& g) {
  int64_t count = 0;
  for (int v = 0; v < nv; v++) {
    g.begin[v] = count;
    int64_t n = n0 + v * L;
    for (int64_t lane = 0; lane < L && n < l.pixels;) {
      const int64_t h = n / l.width, w = n % l.width, len = std::min<int64_t>(L - lane, l.width - w);
      Piece& p = g.piece[count++];
      p.offset = h * l.row_pitch + w - lane;
      p.lanes = lanes_from(lane);
      lane += len;
      n += len;
    }
    if (g.begin[v] == count) {  // nothing but padding
      g.piece[count].offset = 0;
      g.piece[count++].lanes = lanes_from(0);
    }
  }
  g.begin[nv] = count;
}

template <int NV>
GP_INLINE void pack_padded(const Layer& l, const Gather& g, int64_t k0, int64_t k1, float* to) {
  int64_t j = k0 / l.taps, t = k0 % l.taps, first[NV], count[NV];
  for (int v = 0; v < NV; v++) first[v] = g.piece[g.begin[v]].offset, count[v] = g.begin[v + 1] - g.begin[v];
  for (int64_t k = k0; k < k1; k++, to += NV * L) {
    const float* from = l.x + j * l.plane + l.tap_offset[t];
    GP_UNROLL for (int v = 0; v < NV; v++) {
      V x = load(from + first[v]);
      const Piece* p = g.piece + g.begin[v] + 1;
      for (int64_t i = 1; i < count[v]; i++, p++) x = load_over(x, from + p->offset, p->lanes);
      *(V*)(to + v * L) = x;
    }
    if (++t == l.taps) t = 0, j++;
  }
}

// Rows [k0, k1) of the panel that starts at pixel n0.
GP_INLINE void pack(const Layer& l, const Gather& g, int64_t n0, int nv, int64_t k0, int64_t k1, float* to) {
  const int64_t width = nv * L, columns = std::min<int64_t>(width, l.pixels - n0);
  if (l.source == Source::contiguous) {
    const int whole = int(columns / L);
    for (int64_t k = k0; k < k1; k++, to += width) {
      const float* from = l.x + k * l.plane + n0;
      int v = 0;
      for (; v < whole; v++) *(V*)(to + v * L) = load(from + v * L);
      for (; v < nv; v++)
        *(V*)(to + v * L) = columns > v * L ? load_part(from + v * L, columns - v * L) : V{};
    }
  } else if (l.source == Source::padded) {
    GP_OF_WIDTH(nv, pack_padded, l, g, k0, k1, to);
  } else {
    transpose(l.x + n0 * l.plane + k0, columns, k1 - k0, l.plane, to, width);
    for (int64_t k = 0; k < k1 - k0; k++)
      for (int64_t n = columns; n < width; n++) to[k * width + n] = 0.f;
  }
}

// Panels side by side: `wide` of nv vectors, then others of one vector less. Panel p starts at the vector `start(p)`.
struct Panels {
  int64_t count, wide;
  int nv;
  int64_t start(int64_t p) const { return p * nv - std::max<int64_t>(0, p - wide); }
  int vectors(int64_t p) const { return p < wide ? nv : nv - 1; }
  Panels first(int64_t n) const { return {n, std::min(n, wide), nv}; }
};

// As equal as can be: with 13 vectors 4, 3, 3 and 3.
static Panels split(int64_t vectors) {
  if (!vectors) return {0, 0, 1};
  const int64_t count = (vectors + GP_MAX_NV - 1) / GP_MAX_NV, rest = vectors % count;
  return {count, rest ? rest : count, int((vectors + count - 1) / count)};
}

// Rows [k0, k1) of the first n panels from pixel n0 on, which lie side by side: a plane at a time, since its pages are
// far from those of the next, and what follows in it comes by itself. Panel p goes to `to + p * block`.
GP_INLINE void pack_planes(const Layer& l, const Panels& panels, int64_t n, int64_t n0, int64_t k0, int64_t k1,
                           float* to, int64_t block) {
  const int64_t run = panels.start(n) * L;
  for (int64_t k = k0; k < k1; k++) {
    const float* from = l.x + k * l.plane + n0;
    for (int64_t i = 0; i < run; i += L) __builtin_prefetch(from + l.plane + i);
    for (int64_t p = 0; p < n; p++) {
      const int64_t width = panels.vectors(p) * L;
      float* row = to + p * block + (k - k0) * width;
      for (int64_t i = 0; i < width; i += L) *(V*)(row + i) = load(from + i);
      from += width;
    }
  }
}

// Bias, gain, residual, activation, in that order; then the store, and the sum of |y| added to `sum` (L floats).
GP_INLINE void finish(const Layer& l, const float* acc, int64_t r, int64_t n0, int nv, float* sum) {
  const V bias = splat(l.bias ? l.bias[row_number(l, r)] : 0.f), gain = splat(l.gain ? l.gain[r] : 1.f);
  const int64_t columns = std::min<int64_t>(nv * L, l.pixels - n0);
  float* y = l.y + r * l.ldy + n0;
  const float* residual = l.residual ? l.residual + r * l.ldy + n0 : nullptr;
  V total = sum ? *(const V*)sum : V{};
  for (int v = 0; v < nv; v++) {
    const int64_t live = columns - v * L;
    V x = (*(const V*)(acc + v * L) + bias) * gain;
    if (live >= L) {
      if (residual) x += load(residual + v * L);
      x = activate(x, l.activation);
      store(y + v * L, x);
      total += vabs(x);
    } else if (live > 0) {
      if (residual) x += load_part(residual + v * L, live);
      x = activate(x, l.activation);
      store_part(y + v * L, x, live);
      total += vabs(keep_part(x, live));
    }
  }
  if (sum) *(V*)sum = total;
}

// Activation of what is stored already, NV vectors of each of ROWS rows, of which the last vector has `live` pixels.
template <int NV, int ROWS>
GP_INLINE void activate_stored(const Layer& l, float* y, int64_t live, float* sums) {
  V x[ROWS * NV];
  GP_UNROLL for (int r = 0; r < ROWS; r++)
    GP_UNROLL for (int v = 0; v < NV; v++) {
      const float* from = y + r * l.ldy + v * L;
      x[r * NV + v] = v < NV - 1 || live == L ? load(from) : load_part(from, live);
    }
  activate_all<ROWS * NV>(x, l.activation);
  GP_UNROLL for (int r = 0; r < ROWS; r++) {
    V total = sums ? *(const V*)(sums + r * L) : V{};
    GP_UNROLL for (int v = 0; v < NV; v++) {
      float* to = y + r * l.ldy + v * L;
      V& one = x[r * NV + v];
      if (v < NV - 1 || live == L) {
        store(to, one);
      } else {
        store_part(to, one, live);
        one = keep_part(one, live);
      }
      total += vabs(one);
    }
    if (sums) *(V*)(sums + r * L) = total;
  }
}

// The same of `count` rows from r on, as many vectors at once as four.
template <int NV>
GP_INLINE void activate_rows(const Layer& l, int64_t r, int count, int64_t n0, float* sums) {
  constexpr int ROWS = NV < 3 ? 4 / NV : 1;
  const int64_t live = std::min<int64_t>(L, l.pixels - n0 - (NV - 1) * L);
  float* y = l.y + r * l.ldy + n0;
  int i = 0;
  for (; i + ROWS <= count; i += ROWS) activate_stored<NV, ROWS>(l, y + i * l.ldy, live, sums ? sums + i * L : nullptr);
  for (; i < count; i++) activate_stored<NV, 1>(l, y + i * l.ldy, live, sums ? sums + i * L : nullptr);
}

// The same for tokens, all rows [r0, r1) of a panel at once: they lie side by side.
GP_INLINE void finish_tokens(const Layer& l, float* acc, int64_t r0, int64_t r1, int64_t n0, int nv) {
  const int64_t width = nv * L, columns = std::min<int64_t>(width, l.pixels - n0);
  for (int64_t r = r0; r < r1; r++) {
    const V bias = splat(l.bias ? l.bias[row_number(l, r)] : 0.f), gain = splat(l.gain ? l.gain[r] : 1.f);
    float* a = acc + (r - r0) * width;
    for (int v = 0; v < nv; v++) *(V*)(a + v * L) = (*(const V*)(a + v * L) + bias) * gain;
  }
  if (!l.residual) activate_run(acc, (r1 - r0) * width, l.activation);
  transpose(acc, r1 - r0, columns, width, l.y + n0 * l.ldy + r0, l.ldy);
  if (!l.residual) return;
  for (int64_t n = n0; n < n0 + columns; n++) {  // a token's channels lie side by side, too
    const float* residual = l.residual + n * l.ldy;
    float* y = l.y + n * l.ldy;
    int64_t r = r0;
    for (; r + L <= r1; r += L) store(y + r, activate(load(y + r) + load(residual + r), l.activation));
    if (r < r1) store_part(y + r, activate(load_part(y + r, r1 - r) + load_part(residual + r, r1 - r), l.activation), r1 - r);
  }
}

#include "last.inl"

// The panels that are packed next: n of those from pixel n0 on, rows from k0 on.
GP_INLINE PixelsAhead next_pixels(const Layer& l, int64_t k0, int64_t rows, int64_t n0, const Panels& like, int64_t n) {
  PixelsAhead a;
  a.x = l.x + k0 * l.plane + n0;
  a.plane = l.plane;
  a.planes = std::min(rows, l.channels - k0);
  a.panels = n;
  a.width = like.nv * L;
  return a;
}

// More where weights do not stay in the second-level cache, and where so little is computed that reading and writing
// pixels is what takes time.
static int64_t group_size(int64_t depth, int64_t rows, int64_t weight_bytes) {
  return depth <= 64 && rows <= 512 ? MAX_GROUP : weight_bytes > (512 << 10) ? MIDDLE_GROUP : LEAST_GROUP;
}

static int64_t scratch(int64_t depth, int64_t row_length, int64_t rows, int64_t weight_bytes) {
  const int64_t group = group_size(depth, rows, weight_bytes);
  return group * PANEL * (K_BLOCK + rows + 16) + rows * L + last_scratch(row_length, rows);
}

GP_TARGET static void layer(const Layer& l, int64_t v0, int64_t v1, int64_t r0, int64_t r1, float* memory, float* sums) {
  static const TileTable tiles;
  const int64_t depth = l.channels * l.taps, rows = r1 - r0;
  const int64_t most = group_size(depth, l.rows, 4 * l.rows * l.ldw);
  Range later = l.ahead;
  const bool in_tiles = !l.tokens_out, afterwards = in_tiles && l.activation > Activation::relu6;
  Layer tiled = l;  // what tiles do of it
  if (afterwards) tiled.activation = Activation::none;
  // Rows of a multiple of 4 KiB share one set of eight lines of the first-level cache.
  const auto rows_of = [few = l.ldw % 1024 == 0](int nv) { return few ? std::min(TILE_ROWS[nv], 6) : TILE_ROWS[nv]; };
  float *totals = memory, *packed = totals + rows * L;  // sums of |y|, a vector for each row; panels
  if (sums) std::memset(totals, 0, rows * L * sizeof(float));
  const Last rest = last_pixels(l, v1, rows, packed);
  packed += rest.scratch;
  Gather gather[MAX_GROUP];
  int64_t left = v1 - v0 - (rest.count > 0), v = v0;
  do {
    const Panels all = split(left);
    // Few panels are one group, so that weights are fetched once, and tiles of both heights end after STEP rows.
    const Panels g = all.first(all.count <= most ? all.count : std::min(most, all.wide));
    // One panel or two: longer blocks, which take no more of the cache, since weights then come in longer runs.
    const int64_t k_block = K_BLOCK * std::max<int64_t>(1, LEAST_GROUP / std::max<int64_t>(1, g.count));
    const bool with_rest = rest.count && left == g.start(g.count);
    const int64_t width = g.nv * L, block = width * k_block, acc_panel = rows * width;
    float* acc = packed + g.count * block;
    auto pixel = [&](int64_t p) { return (v + g.start(p)) * L; };
    int64_t whole = 0;  // panels
    if (l.source == Source::contiguous)
      while (whole < g.count && pixel(whole + 1) <= l.pixels) whole++;
    if (l.source == Source::padded)
      for (int64_t p = 0; p < g.count; p++) plan(l, pixel(p), g.vectors(p), gather[p]);
    for (int64_t k0 = 0; k0 < depth || k0 == 0; k0 += k_block) {
      const int64_t k1 = std::min(depth, k0 + k_block);
      const bool last = k1 == depth;
      pack_planes(l, g, whole, pixel(0), k0, k1, packed, block);
      for (int64_t p = whole; p < g.count; p++) pack(l, gather[p], pixel(p), g.vectors(p), k0, k1, packed + p * block);
      for (int64_t p = 0; p < g.count; p++) pair_rows(packed + p * block, k1 - k0, g.vectors(p) * L);
      const int64_t q0 = k0 / PAIR, n = (k1 - k0 + PAIR - 1) / PAIR;  // in the weights' rows
      PixelsAhead pixels;  // of the next block or group
      if (whole == g.count && !last) pixels = next_pixels(l, k1, k_block, pixel(0), g, g.count);
      if (whole == g.count && last)
        pixels = next_pixels(l, 0, k_block, pixel(g.count), g, std::min(most, all.count - g.count));
      // Those, and then where the next rows go.
      auto fetch = [&](int64_t r, int64_t p) -> Fetch {
        if (pixels.panels) return pixels.take(n);
        if (!last || l.tokens_out || r >= r1) return {};
        const float* next = (l.residual ? l.residual : l.y) + r * l.ldy + pixel(p);
        const int64_t columns = 4 * std::min<int64_t>(rows_of(g.nv), r1 - r);
        return {reinterpret_cast<const char*>(next), columns, l.ldy * 4, cache_lines(width)};
      };
      const int64_t step = g.wide < g.count ? STEP : rows_of(g.nv);
      const int64_t rest0 = l.row_length * k0 / std::max<int64_t>(1, depth) / L * L;
      const int64_t rest1 = last ? l.row_length : l.row_length * k1 / depth / L * L;
      int64_t done = r0;  // rows of the last pixels
      for (int64_t s0 = r0; s0 < r1; s0 += step) {
        for (int64_t p0 = 0, p1; p0 < g.count; p0 = p1) {
          p1 = p0 < g.wide ? g.wide : g.count;
          const int nv = g.vectors(p0), tall = rows_of(nv);
          const int64_t s1 = std::min(s0 + step, r1);
          for (int64_t r = s0; r < s1; r += tall) {
            const int height = int(std::min<int64_t>(tall, s1 - r));
            const float *row[16], *ahead[16];
            // The next rows; after the last ones the first ones again, further right.
            const bool wrap = s1 == r1, more = p0 == 0 && (!wrap || k1 + (k1 - k0) <= depth);
            const int64_t next = wrap ? r0 + (r - s0) : r + step;
            for (int i = 0; i < height; i++) {
              row[i] = row_of(l, r + i);
              ahead[i] = row_of(l, std::min(next + i, r1 - 1));
            }
            float* sum = sums ? totals + (r - r0) * L : nullptr;
            for (int64_t p = p0; p < p1; p++) {
              float* a = acc + p * acc_panel + (r - r0) * nv * L;
              const Goal goal{&tiled, r, pixel(p), afterwards ? nullptr : sum, fetch(r + tall, p), take(later, n)};
              tiles.of[in_tiles && last][nv][height](row, l.columns + q0, n, packed + p * block, a, k0 == 0,
                                                   more && p == 0 ? ahead : nullptr, l.columns + (wrap ? q0 + n : q0),
                                                   goal);
              if (afterwards && last) GP_OF_WIDTH(nv, activate_rows, l, r, height, pixel(p), sum);
            }
          }
        }
        const int64_t s1 = std::min(s0 + step, r1);
        if (with_rest)
          done = LAST_BLOCKS[rest.count](l, rest, r0, done, s1, s1 == r1, rest0, rest1, k0 == 0, last);
      }
    }
    if (l.tokens_out)
      for (int64_t p = 0; p < g.count; p++) finish_tokens(l, acc + p * acc_panel, r0, r1, pixel(p), g.vectors(p));
    v += g.start(g.count);
    left -= g.start(g.count);
  } while (left > 0);
  if (rest.count && l.tokens_out) finish_tokens(l, rest.sums, r0, r1, rest.first, 1);
  if (rest.count && !l.tokens_out)
    for (int64_t r = r0; r < r1; r++)
      finish(l, rest.sums + (r - r0) * L, r, rest.first, 1, sums ? totals + (r - r0) * L : nullptr);
  if (sums)
    for (int64_t r = r0; r < r1; r++) sums[r] += hsum(*(const V*)(totals + (r - r0) * L));
}

// Several vectors at once, from one row of the map or from several, since each waits for its own last product.
template <int NV, bool POOL>
GP_INLINE void taps_of(const Depthwise& d, const int64_t* at, V* a) {
  GP_UNROLL for (int v = 0; v < NV; v++) a[v] = POOL ? load(d.x + d.tap_offset[0] + at[v]) : V{};
  for (int64_t t = POOL ? 1 : 0; t < d.taps; t++) {
    const float* x = d.x + d.tap_offset[t];
    const V s = POOL ? V{} : splat(d.weight[t]);
    GP_UNROLL for (int v = 0; v < NV; v++) {
      if (POOL)
        a[v] = vmax_nan(load(x + at[v]), a[v]);
      else
        a[v] += s * load(x + at[v]);
    }
  }
}

// What follows the taps, and the store; returns |y|, of a whole vector or of its first `live` lanes.
template <bool POOL>
GP_INLINE V finish_taps(const Depthwise& d, V a, float* to, int64_t live) {
  const V y = POOL ? a : activate((a + d.bias) * d.gain, d.activation);
  if (live >= L) {
    store(to, y);
    return vabs(y);
  }
  store_part(to, y, live);
  return vabs(keep_part(y, live));
}

// The same for a vector of each of N rows `pitch` apart; returns the sum of |y| without the first `skip` ones.
template <int N>
GP_TARGET static V finish_rows(V bias, V gain, Activation activation, const V* a, float* to, int64_t pitch, int64_t live,
                               int64_t skip) {
  V y[N], total = V{};
  GP_UNROLL for (int r = 0; r < N; r++) y[r] = (a[r] + bias) * gain;
  activate_all<N>(y, activation);
  if (live >= L)
    GP_UNROLL for (int r = 0; r < N; r++) store(to + r * pitch, y[r]);
  else
    GP_UNROLL for (int r = 0; r < N; r++) {
      store_part(to + r * pitch, y[r], live);
      y[r] = keep_part(y[r], live);
    }
  GP_UNROLL for (int r = 0; r < N; r++)
    if (r >= skip) total += vabs(y[r]);
  return total;
}

template <bool POOL>
GP_TARGET static void over_taps(const Depthwise& d, float* sum) {
  constexpr int MANY = 8;
  V total = V{};
  int64_t h = 0, w = 0;
  while (h < d.height) {
    V a[MANY];
    int64_t at[MANY], to[MANY], live[MANY];
    int n = 0;
    for (; n < MANY && h < d.height; n++) {
      at[n] = h * d.row_pitch + w;
      to[n] = h * d.width + w;
      live[n] = d.width - w;
      w += L;
      if (w >= d.width) w = 0, h++;
    }
    for (int v = n; v < MANY; v++) at[v] = at[n - 1];
    if (n > 4)
      taps_of<8, POOL>(d, at, a);
    else if (n > 2)
      taps_of<4, POOL>(d, at, a);
    else
      taps_of<2, POOL>(d, at, a);
    for (int v = 0; v < n; v++) total += finish_taps<POOL>(d, a[v], d.y + to[v], live[v]);
  }
  if (sum) *sum += hsum(total);
}

// A pooling over K × K pixels, four rows of the output at once, so that what is read of x serves several of them; the taps'
// rows lie half as far apart as those of the output.
template <int K>
GP_TARGET static void pool_rows(const Depthwise& d) {
  constexpr int ROWS = 4;
  for (int64_t h = 0; h < d.height; h += ROWS) {
    const int64_t first = std::min(h, d.height - ROWS);  // the last rows once more, if they do not fill a step
    for (int64_t w = 0; w < d.width; w += L) {
      V a[ROWS];
      const float* x = d.x + first * d.row_pitch + w;
      GP_UNROLL for (int r = 0; r < ROWS; r++) a[r] = load(x + r * d.row_pitch + d.tap_offset[0]);
      GP_UNROLL for (int i = 0; i < (ROWS - 1) * 2 + K; i++)
        GP_UNROLL for (int j = 0; j < K; j++) {
          const V xi = load(x + i * (d.row_pitch / 2) + d.tap_offset[j]);
          GP_UNROLL for (int r = 0; r < ROWS; r++)
            if (i - 2 * r >= 0 && i - 2 * r < K) a[r] = vmax_nan(xi, a[r]);
        }
      for (int r = 0; r < ROWS; r++) finish_taps<true>(d, a[r], d.y + (first + r) * d.width + w, d.width - w);
    }
  }
}

// Whether `pool_rows` may compute it.
template <int K>
static bool in_rows(const Depthwise& d) {
  if (d.taps != K * K || d.height < 4) return false;
  for (int t = 0; t < K * K; t++)
    if (d.tap_offset[t] != t / K * (d.row_pitch / 2) + d.tap_offset[t % K]) return false;
  return d.row_pitch % 2 == 0;
}

// The sums of ROWS rows and NV vectors of pixels from column w on, of K × K taps and stride S, from a plane that is not
// padded: there is padding where `row` is null and, if EDGE, where lanes are not in `inner`, of each vector of a row.
template <int K, int S, int ROWS, int NV, bool EDGE>
GP_INLINE void taps_of_plane(const float* const* row, int64_t w, const V* weight, const Lanes (*inner)[S * NV],
                             V (*a)[ROWS]) {
  V sum[NV][ROWS] = {};  // in registers, as `a` is not
  GP_UNROLL for (int i = 0; i < (ROWS - 1) * S + K; i++) {
    if (!row[i]) continue;
    GP_UNROLL for (int j0 = 0; j0 < K; j0 += S) {
      V part[S * NV], x[S][NV];  // S taps at once
      GP_UNROLL for (int v = 0; v < S * NV; v++) {
        const float* from = row[i] + w * S + v * L + j0;
        part[v] = EDGE ? load_lanes(from, inner[j0 / S][v]) : load(from);
      }
      GP_UNROLL for (int v = 0; v < NV; v++)
        if constexpr (S == 1) {
          x[0][v] = part[v];
        } else {
          x[0][v] = every_other<0>(part[2 * v], part[2 * v + 1]);
          x[1][v] = every_other<1>(part[2 * v], part[2 * v + 1]);
        }
      GP_UNROLL for (int j = j0; j < std::min(K, j0 + S); j++)
        GP_UNROLL for (int r = 0; r < ROWS; r++) {
          const int t = i - r * S;
          if (t < 0 || t >= K) continue;
          const V s = weight[t * K + j];
          GP_UNROLL for (int v = 0; v < NV; v++) sum[v][r] = multiply_add(sum[v][r], x[j - j0][v], s);
        }
    }
  }
  GP_UNROLL for (int v = 0; v < NV; v++)
    GP_UNROLL for (int r = 0; r < ROWS; r++) a[v][r] = sum[v][r];
}

// Those vectors of rows `first` …, of which `skip` are there already; returns the sum of |y|.
template <int K, int S, int ROWS, int NV>
GP_INLINE V part_of_plane(const Depthwise& d, const float* const* row, const V* weight, int64_t first, int64_t skip,
                          int64_t w) {
  V a[NV][ROWS], total = V{};
  const int64_t begin = w * S - d.left;
  if (begin >= 0 && begin + S * NV * L + K - 1 <= d.in_width) {
    taps_of_plane<K, S, ROWS, NV, false>(row, w, weight, nullptr, a);
  } else {
    Lanes inner[(K + S - 1) / S][S * NV];
    for (int64_t j = 0; j < K; j += S)
      for (int64_t v = 0; v < S * NV; v++) {
        const int64_t column = begin + v * L + j;  // of the first lane
        inner[j / S][v] = lanes_between(std::min<int64_t>(L, std::max<int64_t>(0, -column)),
                                        std::min<int64_t>(L, std::max<int64_t>(0, d.in_width - column)));
      }
    taps_of_plane<K, S, ROWS, NV, true>(row, w, weight, inner, a);
  }
  for (int64_t v = 0; v < NV; v++, w += L)
    total += finish_rows<ROWS>(splat(d.bias), splat(d.gain), d.activation, a[v], d.y + first * d.width + w, d.width,
                               d.width - w, skip);
  return total;
}

// A convolution of K × K taps and stride S from the plane itself, four rows of the output at once: of small planes copying
// takes as long as computing.
template <int K, int S>
GP_TARGET static void over_plane(const Depthwise& d, float* sum) {
  constexpr int ROWS = 4, READ = (ROWS - 1) * S + K, MANY = S == 1 ? 2 : 1;
  V weight[K * K], total = V{};
  for (int t = 0; t < K * K; t++) weight[t] = splat(d.weight[t]);
  for (int64_t h = 0, next; h < d.height; h = next) {
    next = h + ROWS;
    const int64_t first = std::min(h, d.height - ROWS);
    const float* row[READ];
    for (int64_t i = 0; i < READ; i++) {
      const int64_t at = first * S + i - d.top;
      row[i] = at >= 0 && at < d.in_height ? d.x + at * d.in_width - d.left : nullptr;
    }
    int64_t w = 0;
    for (; w + (MANY - 1) * L < d.width; w += MANY * L)
      total += part_of_plane<K, S, ROWS, MANY>(d, row, weight, first, h - first, w);
    if (w < d.width) total += part_of_plane<K, S, ROWS, 1>(d, row, weight, first, h - first, w);
  }
  if (sum) *sum += hsum(total);
}

GP_TARGET static void depthwise(const Depthwise& d, float* sum) {
  if (!d.weight) return in_rows<3>(d) ? pool_rows<3>(d) : over_taps<true>(d, sum);
  if (d.tap_offset) return over_taps<false>(d, sum);
  if (d.taps == 9) return d.stride == 1 ? over_plane<3, 1>(d, sum) : over_plane<3, 2>(d, sum);
  if (d.taps == 25) return d.stride == 1 ? over_plane<5, 1>(d, sum) : over_plane<5, 2>(d, sum);
  d.stride == 1 ? over_plane<7, 1>(d, sum) : over_plane<7, 2>(d, sum);
}

// sums[c] = sum over tokens of x[t][c], or of |x[t][c]|.
template <bool SIGNED>
GP_INLINE void add_tokens(const float* x, int64_t tokens, int64_t channels, float* sums) {
  int64_t c = 0;
  for (; c + 4 * L <= channels; c += 4 * L) {
    V a[4] = {};
    for (int64_t t = 0; t < tokens; t++)
      GP_UNROLL for (int v = 0; v < 4; v++) {
        const V one = load(x + t * channels + c + v * L);
        a[v] += SIGNED ? one : vabs(one);
      }
    for (int v = 0; v < 4; v++) store(sums + c + v * L, a[v]);
  }
  for (; c < channels; c += L) {
    const int64_t live = std::min<int64_t>(L, channels - c);
    V a = V{};
    for (int64_t t = 0; t < tokens; t++) {
      const V one = load_part(x + t * channels + c, live);
      a += SIGNED ? one : vabs(one);
    }
    live == L ? store(sums + c, a) : store_part(sums + c, a, live);
  }
}
GP_TARGET static void sum_tokens(const float* x, int64_t tokens, int64_t channels, bool is_signed, float* sums) {
  is_signed ? add_tokens<true>(x, tokens, channels, sums) : add_tokens<false>(x, tokens, channels, sums);
}

GP_TARGET static float affine(const float* x, int64_t n, float scale, float shift, Activation act, float* y) {
  V sum = V{};
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    const V v = activate(load(x + i) * scale + shift, act);
    store(y + i, v);
    sum += vabs(v);
  }
  if (i < n) {
    const V v = activate(load_part(x + i, n - i) * scale + shift, act);
    store_part(y + i, v, n - i);
    sum += vabs(keep_part(v, n - i));
  }
  return hsum(sum);
}

// y[r] = w[r] · x + bias[r]. Several rows at once, since each waits for its own last sum and for its own memory; as many
// after them are fetched if AHEAD.
template <int R, bool AHEAD>
GP_INLINE void dots(const float* w, int64_t n, const float* x, const float* bias, float* y) {
  V a[R], b[R];
  GP_UNROLL for (int r = 0; r < R; r++) a[r] = b[r] = V{};
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    const V x0 = load(x + i), x1 = load(x + i + L);
    GP_UNROLL for (int r = 0; r < R; r++) {
      for (int j = 0; AHEAD && j < 2 * L; j += 16) __builtin_prefetch(w + (R + r) * n + i + j, 0, 2);
      a[r] += load(w + r * n + i) * x0;
      b[r] += load(w + r * n + i + L) * x1;
    }
  }
  for (; i < n; i += L) {
    const int64_t live = std::min<int64_t>(L, n - i);
    const V x0 = load_part(x + i, live);
    GP_UNROLL for (int r = 0; r < R; r++) a[r] += load_part(w + r * n + i, live) * x0;
  }
  for (int r = 0; r < R; r++) y[r] = hsum(a[r] + b[r]) + (bias ? bias[r] : 0.f);
}

GP_TARGET static void matvec(const float* w, int64_t rows, int64_t n, const float* x, const float* bias, float* y) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) {
    const float* b = bias ? bias + r : nullptr;
    if (n <= 512)
      dots<8, true>(w + r * n, n, x, b, y + r);
    else  // the hardware foresees long runs
      dots<8, false>(w + r * n, n, x, b, y + r);
  }
  for (; r < rows; r++) dots<1, false>(w + r * n, n, x, bias ? bias + r : nullptr, y + r);
}

// Every S-th value of x, a vector of them, where the last one counts that may be read.
template <int S>
GP_INLINE V every(const float* x, int64_t live) {
  V part[S];
  for (int i = 0; i < S; i++)
    part[i] = live >= (i + 1) * L ? load(x + i * L) : live > i * L ? load_part(x + i * L, live - i * L) : V{};
  for (int n = S; n > 1; n /= 2)
    for (int i = 0; i < n / 2; i++) part[i] = every_other<0>(part[2 * i], part[2 * i + 1]);
  return part[0];
}
template <int S>
GP_INLINE void every(const float* x, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + L < n; i += L) store(y + i, every<S>(x + S * i, S * L));
  if (i == n) return;
  const V rest = every<S>(x + S * i, S * (n - i - 1) + 1);  // what lies beyond the last one may not be there
  n - i == L ? store(y + i, rest) : store_part(y + i, rest, n - i);
}

// y[i] = x[i * stride] for i < n.
GP_INLINE void every(const float* x, int64_t stride, int64_t n, float* y) {
  if (stride == 1) return every<1>(x, n, y);
  if (stride == 2) return every<2>(x, n, y);
  if (stride == 4) return every<4>(x, n, y);
  for (int64_t i = 0; i < n; i++) y[i] = x[i * stride];
}

GP_TARGET static void pad(const Padding& p, const float* x, bool edges, float* y) {
  const int64_t pitch = p.phases * p.columns;
  for (int64_t r = 0; r < p.rows; r++, y += pitch) {
    const int64_t h = r * p.step - p.top;
    const bool inside = h >= 0 && h < p.height;
    if (edges && !inside)
      for (int64_t i = 0; i < pitch; i++) y[i] = p.fill;
    if (!inside) continue;
    for (int64_t f = 0; f < p.phases; f++) {
      const Phase& q = p.phase[f];
      float* to = y + f * p.columns;
      if (edges) {
        for (int64_t i = 0; i < q.left; i++) to[i] = p.fill;
        for (int64_t i = q.left + q.n; i < p.columns; i++) to[i] = p.fill;
      }
      every(x + h * p.width + q.first, p.stride, q.n, to + q.left);
    }
  }
}

// The sum of n values, or of |x|.
template <bool SIGNED>
GP_INLINE float add_up(const float* x, int64_t n) {
  V a[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    GP_UNROLL for (int v = 0; v < 4; v++) {
      const V one = load(x + i + v * L);
      a[v] += SIGNED ? one : vabs(one);
    }
  for (; i < n; i += L) {
    const V one = load_part(x + i, std::min<int64_t>(L, n - i));
    a[0] += SIGNED ? one : vabs(one);
  }
  return hsum((a[0] + a[1]) + (a[2] + a[3]));
}
GP_TARGET static float sum(const float* x, int64_t n, bool is_signed) {
  return is_signed ? add_up<true>(x, n) : add_up<false>(x, n);
}

#include "winograd.inl"

#include "phases.inl"

#include "resize.inl"

}  // namespace GP_NS
}  // namespace gatedprune
