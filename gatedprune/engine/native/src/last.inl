// The last pixels of a map, where they would leave most of a vector empty: of 7×7 pixels the 49th takes a fourth vector
// of 16. Their products run along the weights' rows, L columns at once, those that are not active masked, while the rows
// are in the cache for the other pixels. Included by kernel.inl.

constexpr int64_t MAX_LAST = L / 3;
// Each pixel has sums of its own to add up: with fewer columns or rows an empty vector costs less.
constexpr int64_t LAST_DEPTH = 64, LAST_ROWS = 16;

// The sums of four vectors.
GP_INLINE Q hsums(const V* of) {
  Q q[4];
  GP_UNROLL for (int i = 0; i < 4; i++) {
    Q part[L / 4];
    std::memcpy(part, of + i, sizeof part);
    q[i] = part[0];
    GP_UNROLL for (int j = 1; j < L / 4; j++) q[i] += part[j];
  }
  const Q ab = GP_SHUFFLE(q[0], q[1], 0, 4, 1, 5) + GP_SHUFFLE(q[0], q[1], 2, 6, 3, 7);
  const Q cd = GP_SHUFFLE(q[2], q[3], 0, 4, 1, 5) + GP_SHUFFLE(q[2], q[3], 2, 6, 3, 7);
  return GP_SHUFFLE(ab, cd, 0, 1, 4, 5) + GP_SHUFFLE(ab, cd, 2, 3, 6, 7);
}

struct Last {
  int64_t count = 0, first = 0;      // of the pixels
  int64_t pitch = 0, scratch = 0;    // floats
  const float* x = nullptr;          // (count, pitch): each value at its column of a weight's row, zeros between
  const int32_t* active = nullptr;   // (pitch,): the bits of active columns; null if all are
  float *partial = nullptr, *sums = nullptr;  // (rows, count, L) so far; (rows, L), pixels first
};

constexpr int64_t whole_vectors(int64_t n) { return (n + L - 1) / L * L; }

static int64_t last_scratch(int64_t row_length, int64_t rows) {
  return (MAX_LAST + 1) * (whole_vectors(row_length) + rows * L);
}

// Those among the vectors up to v1, if any are computed so; packed into `memory`.
GP_TARGET static Last last_pixels(const Layer& l, int64_t v1, int64_t rows, float* memory) {
  const int64_t rest = l.pixels % L, depth = l.channels * l.taps, columns = (depth + PAIR - 1) / PAIR;
  // At most half as many products as the empty vector has.
  const bool pays = rest && rest <= MAX_LAST && 2 * rest * l.row_length <= L * columns;
  if (!pays || v1 * L < l.pixels || depth < LAST_DEPTH || rows < LAST_ROWS) return {};
  Last a;
  a.count = rest;
  a.first = l.pixels - rest;
  a.pitch = whole_vectors(l.row_length);
  a.scratch = last_scratch(l.row_length, rows);
  a.partial = memory + (MAX_LAST + 1) * a.pitch;
  a.sums = a.partial + MAX_LAST * rows * L;
  a.x = memory;
  std::memset(memory, 0, (rest + 1) * a.pitch * sizeof(float));
  int32_t* active = reinterpret_cast<int32_t*>(memory + rest * a.pitch);
  if (l.row_length != columns) a.active = active;
  const int64_t step = l.source == Source::tokens ? 1 : l.plane;
  for (int64_t p = 0; p < rest; p++)
    for (int64_t t = 0; t < l.taps; t++) {
      const int64_t n = a.first + p;
      const float* from = l.x + (l.source == Source::padded ? n / l.width * l.row_pitch + n % l.width + l.tap_offset[t]
                                 : l.source == Source::tokens ? n * l.plane
                                                              : n);
      float* to = memory + p * a.pitch;
      for (int64_t j = t; j < depth; j += l.taps, from += step) {
#ifdef GP_PAIRS
        reinterpret_cast<uint16_t*>(to)[j] = rounded(*from);
#else
        to[l.columns[j]] += *from;  // a channel may be named twice
        active[l.columns[j]] = -1;
#endif
      }
    }
  return a;
}

// Columns [q0, q1) of R rows; `last`: the sums are complete.
template <int R, int P>
GP_INLINE void last_rows(const Layer& l, const Last& a, int64_t r0, int64_t r, int64_t q0, int64_t q1, bool first,
                         bool last) {
  V sum[R][P];
  const float* row[R];
  float* partial = a.partial + (r - r0) * P * L;
  GP_UNROLL for (int i = 0; i < R; i++) {
    row[i] = row_of(l, r + i);
    GP_UNROLL for (int p = 0; p < P; p++) sum[i][p] = first ? V{} : *(const V*)(partial + (i * P + p) * L);
  }
  for (int64_t q = q0; q < q1; q += L) {
    V w[R];
    const int64_t live = std::min<int64_t>(L, q1 - q);
    if (live == L)
      GP_UNROLL for (int i = 0; i < R; i++) w[i] = load(row[i] + q);
    else
      GP_UNROLL for (int i = 0; i < R; i++) w[i] = load_part(row[i] + q, live);
    if (a.active) {
      const M active = *(const M*)(a.active + q);
      GP_UNROLL for (int i = 0; i < R; i++) w[i] = (V)((M)w[i] & active);
    }
    GP_UNROLL for (int p = 0; p < P; p++) {
      const V x = *(const V*)(a.x + p * a.pitch + q);
      GP_UNROLL for (int i = 0; i < R; i++) sum[i][p] = multiply_add(sum[i][p], x, w[i]);
    }
  }
  if (!last) {
    GP_UNROLL for (int i = 0; i < R * P; i++) *(V*)(partial + i * L) = sum[i / P][i % P];
    return;
  }
  float total[(R * P + 3) / 4 * 4];
  GP_UNROLL for (int i = 0; i < R * P; i += 4) {
    V four[4];
    GP_UNROLL for (int j = 0; j < 4; j++) four[j] = i + j < R * P ? sum[(i + j) / P][(i + j) % P] : V{};
    *(QU*)(total + i) = hsums(four);
  }
  GP_UNROLL for (int i = 0; i < R; i++) *(V*)(a.sums + (r - r0 + i) * L) = load_part(total + i * P, P);
}

// Rows [from, to), as far as whole tiles go unless they are the `final` ones; returns where the next ones begin.
template <int R, int P>
GP_TARGET static int64_t last_block(const Layer& l, const Last& a, int64_t r0, int64_t from, int64_t to, bool final,
                                    int64_t q0, int64_t q1, bool first, bool last) {
  for (; from + R <= to; from += R) last_rows<R, P>(l, a, r0, from, q0, q1, first, last);
  for (; final && from < to; from++) last_rows<1, P>(l, a, r0, from, q0, q1, first, last);
  return from;
}
typedef int64_t (*LastBlock)(const Layer&, const Last&, int64_t, int64_t, int64_t, bool, int64_t, int64_t, bool, bool);
constexpr LastBlock LAST_BLOCKS[] = {
    nullptr,
    &last_block<8, 1>,
#if GP_LANES >= 8
    &last_block<4, 2>,
#endif
#if GP_LANES >= 16
    &last_block<4, 3>,
    &last_block<4, 4>,
    &last_block<4, 5>,
#endif
};
static_assert(sizeof(LAST_BLOCKS) / sizeof(LastBlock) == MAX_LAST + 1, "one for each number of pixels");
