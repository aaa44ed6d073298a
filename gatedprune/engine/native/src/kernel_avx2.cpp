// The kernels for avx2.
#if defined(__x86_64__) && defined(__GNUC__)
#define GP_NS avx2
#define GP_TARGET __attribute__((target("avx2,fma")))
#include "avx2.inl"

#define GP_MAX_NV 2
#define GP_TILE_1 8
#define GP_TILE_2 6
#define GP_TILE_3 0
#define GP_TILE_4 0
#include "kernel.inl"

namespace gatedprune {
const Kernels* kernels_avx2() {
  static const Kernels all{"avx2", avx2::L, &avx2::scratch, &avx2::layer, &avx2::depthwise, &avx2::abs_sum,
                           &avx2::affine, &avx2::matvec, &avx2::abs_sum_tokens, &avx2::pad,
                           &avx2::winograd_scratch, &avx2::winograd, &avx2::phases_scratch, &avx2::phases, &avx2::resize};
  return &all;
}
}  // namespace gatedprune
#else
#include "layer.h"
const gatedprune::Kernels* gatedprune::kernels_avx2() { return nullptr; }
#endif
