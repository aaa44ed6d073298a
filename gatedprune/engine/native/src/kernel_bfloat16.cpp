// The kernel for bfloat16 weights on CPUs with AVX512_BF16 and AVX512_VBMI2.
#include "layer.h"
#if defined(__x86_64__) && ((defined(__clang__) && __clang_major__ >= 10) || (!defined(__clang__) && __GNUC__ >= 10))
#define GP_NS bfloat16
#define GP_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx512vbmi2,avx2,fma")))
#define GP_PAIRS
#include "avx512.inl"

namespace gatedprune {
namespace bfloat16 {
// a + the products of both halves of each lane.
GP_PARTIAL V dot(V a, V x, V w) { return (V)_mm512_dpbf16_ps((__m512)a, (__m512bh)x, (__m512bh)w); }
// Lane i: a[i] and b[i] rounded to bfloat16, a first.
GP_PARTIAL V pair(V a, V b) {
  static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  return (V)_mm512_permutexvar_epi16(_mm512_loadu_si512(order), both);
}
GP_PARTIAL uint16_t rounded(float x) {
  return (uint16_t)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x)), 0);
}
}  // namespace bfloat16
}  // namespace gatedprune
#include "kernel.inl"

namespace gatedprune {
namespace bfloat16 {
GP_TARGET static void compress(const uint16_t* from, const uint32_t* mask, int64_t words, uint16_t* to) {
  for (int64_t i = 0; i < words; i++) {
    const __mmask32 m = mask[i];
    const int n = __builtin_popcount(m);
    const __m512i x = _mm512_maskz_compress_epi16(m, _mm512_maskz_loadu_epi16(m, from + 32 * i));
    _mm512_mask_storeu_epi16(to, n == 32 ? ~0u : (1u << n) - 1, x);
    to += n;
  }
}
}  // namespace bfloat16
const PairKernels* kernels_bfloat16() {
  static const PairKernels all{&bfloat16::layer, &bfloat16::compress};
  static const bool there = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return there ? &all : nullptr;
}
}  // namespace gatedprune
#else
const gatedprune::PairKernels* gatedprune::kernels_bfloat16() { return nullptr; }
#endif
