// What the kernels for AVX-512 have in common; the including file defines GP_NS and GP_TARGET.
#define GP_LANES 16
#define GP_MAX_NV 4
#define GP_TILE_1 12
#define GP_TILE_2 12
#define GP_TILE_3 8
#define GP_TILE_4 6
#include <immintrin.h>

#include <cstdint>
namespace gatedprune {
namespace GP_NS {
typedef float V __attribute__((vector_size(64)));
#define GP_PARTIAL static inline __attribute__((always_inline)) GP_TARGET
GP_PARTIAL __mmask16 first(int64_t n) { return (__mmask16)((1u << n) - 1); }
GP_PARTIAL V load_part(const float* p, int64_t n) { return (V)_mm512_maskz_loadu_ps(first(n), p); }
GP_PARTIAL void store_part(float* p, V v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), (__m512)v); }
typedef __mmask16 Lanes;
GP_PARTIAL V load_over(V x, const float* p, Lanes m) { return (V)_mm512_mask_loadu_ps((__m512)x, m, p); }
GP_PARTIAL V keep_part(V v, int64_t n) { return (V)_mm512_maskz_mov_ps(first(n), (__m512)v); }
GP_PARTIAL Lanes lanes_between(int64_t from, int64_t to) { return to > from ? (Lanes)((1u << to) - (1u << from)) : (Lanes)0; }
GP_PARTIAL V load_lanes(const float* p, Lanes m) { return (V)_mm512_maskz_loadu_ps(m, p); }
typedef Lanes Span;
GP_PARTIAL Span span(int64_t from, int64_t to) { return lanes_between(from, to); }
GP_PARTIAL V load_span(V x, const float* p, Span s) { return (V)_mm512_mask_loadu_ps((__m512)x, s, p); }
GP_PARTIAL void store_span(float* p, V v, Span s) { _mm512_mask_storeu_ps(p, s, (__m512)v); }
GP_PARTIAL V keep_span(V v, Span s) { return (V)_mm512_maskz_mov_ps(s, (__m512)v); }
}  // namespace GP_NS
}  // namespace gatedprune
