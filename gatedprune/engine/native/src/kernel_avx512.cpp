// The kernels for avx512.
#if defined(__x86_64__) && defined(__GNUC__)
#define GP_NS avx512
#define GP_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
#include "avx512.inl"

#include "kernel.inl"

namespace gatedprune {
const Kernels* kernels_avx512() {
  static const Kernels all{"avx512", avx512::L, &avx512::scratch, &avx512::layer, &avx512::depthwise, &avx512::sum,
                           &avx512::affine, &avx512::matvec, &avx512::sum_tokens, &avx512::pad,
                           &avx512::winograd_scratch, &avx512::winograd, &avx512::phases_scratch, &avx512::phases, &avx512::resize};
  return &all;
}
}  // namespace gatedprune
#else
#include "layer.h"
const gatedprune::Kernels* gatedprune::kernels_avx512() { return nullptr; }
#endif
