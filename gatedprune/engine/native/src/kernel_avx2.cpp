// The kernels for avx2.
#if defined(__x86_64__) && defined(__GNUC__)
#define GP_NS avx2
#define GP_TARGET __attribute__((target("avx2,fma")))
#define GP_LANES 8
#define GP_MAX_NV 2
#define GP_TILE_1 8
#define GP_TILE_2 6
#define GP_TILE_3 0
#define GP_TILE_4 0
#include <immintrin.h>

#include <cstdint>
namespace gatedprune {
namespace GP_NS {
typedef float V __attribute__((vector_size(32)));
#define GP_PARTIAL static inline __attribute__((always_inline)) GP_TARGET
alignas(64) constexpr int32_t FIRST[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
alignas(64) constexpr int32_t LANE[16] = {0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7};
// The first n lanes.
GP_PARTIAL __m256i first(int64_t n) { return _mm256_loadu_si256((const __m256i*)(FIRST + 8 - n)); }
GP_PARTIAL V load_part(const float* p, int64_t n) { return (V)_mm256_maskload_ps(p, first(n)); }
// By halves: a masked store takes tens of cycles on some processors.
GP_PARTIAL void store_part(float* p, V v, int64_t n) {
  __m128 part = _mm256_castps256_ps128((__m256)v);
  if (n & 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps((__m256)v, 1);
    p += 4;
  }
  if (n & 2) {
    _mm_storel_pi((__m64*)p, part);
    part = _mm_movehl_ps(part, part);
    p += 2;
  }
  if (n & 1) _mm_store_ss(p, part);
}
typedef __m256i Lanes;
GP_PARTIAL V load_over(V x, const float* p, Lanes m) {
  return (V)_mm256_blendv_ps((__m256)x, _mm256_loadu_ps(p), _mm256_castsi256_ps(m));
}
GP_PARTIAL Lanes lanes_between(int64_t from, int64_t to) { return _mm256_andnot_si256(first(from), first(to)); }
GP_PARTIAL V load_lanes(const float* p, Lanes m) { return (V)_mm256_maskload_ps(p, m); }
GP_PARTIAL V keep_part(V v, int64_t n) { return (V)_mm256_and_ps((__m256)v, _mm256_castsi256_ps(first(n))); }
// Lanes [from, to), which need not be any; p is where the first lane of the vector would lie.
struct Span {
  int64_t from, to;
};
GP_PARTIAL Span span(int64_t from, int64_t to) { return {from, to > from ? to : from}; }
GP_PARTIAL __m256i lanes_of(Span s) { return lanes_between(s.from, s.to); }
GP_PARTIAL V load_span(V x, const float* p, Span s) {
  const __m256i lanes = lanes_of(s);
  return (V)_mm256_blendv_ps((__m256)x, _mm256_maskload_ps(p, lanes), _mm256_castsi256_ps(lanes));
}
GP_PARTIAL void store_span(float* p, V v, Span s) {
  if (s.to - s.from == 8) return _mm256_storeu_ps(p, (__m256)v);
  const __m256i from = _mm256_loadu_si256((const __m256i*)(LANE + s.from));
  store_part(p + s.from, (V)_mm256_permutevar8x32_ps((__m256)v, from), s.to - s.from);
}
GP_PARTIAL V keep_span(V v, Span s) { return (V)_mm256_and_ps((__m256)v, _mm256_castsi256_ps(lanes_of(s))); }
#define GP_MULTIPLY_ADD
// In the register of the sum: left to choose, the compiler takes others, runs out of its 16, and puts a sum on the stack, where
// each product waits for it to be written and read again.
GP_PARTIAL V multiply_add(V a, V x, V s) {
  __asm__("vfmadd231ps %2, %1, %0" : "+x"(a) : "x"(s), "x"(x));
  return a;
}
}  // namespace GP_NS
}  // namespace gatedprune

#include "kernel.inl"

namespace gatedprune {
const Kernels* kernels_avx2() {
  static const Kernels all{"avx2", avx2::L, &avx2::scratch, &avx2::layer, &avx2::depthwise, &avx2::sum,
                           &avx2::affine, &avx2::matvec, &avx2::sum_tokens, &avx2::pad,
                           &avx2::winograd_scratch, &avx2::winograd, &avx2::phases_scratch, &avx2::phases, &avx2::resize};
  return &all;
}
}  // namespace gatedprune
#else
#include "layer.h"
const gatedprune::Kernels* gatedprune::kernels_avx2() { return nullptr; }
#endif
