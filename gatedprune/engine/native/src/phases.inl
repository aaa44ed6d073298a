// 7×7 convolutions of stride 2, the first layer of many networks, by minimal filtering: 100 products of each channel where
// there were 196. Along each dimension the kernel consists of three with stride 1, on every other row of the input: taps 0
// and 2, taps 4 and 6, by F(2, 2), and taps 1, 3 and 5 by F(2, 3), which have the points 0, 1 and infinity in common; only
// F(2, 3) has a fourth one, -1. What parts give at a point is added up in the product of matrices there, as if they were
// channels. (Four taps at once by F(2, 4) would be 81 products, with three times the rounding error.) Included by kernel.inl.

constexpr int PARTS = 3, VALUES = 10;  // of the parts together: 3, 3 and 4
// The part that value v belongs to, and its point.
constexpr int PART_OF[VALUES] = {0, 0, 0, 1, 1, 1, 2, 2, 2, 2}, POINT_OF[VALUES] = {0, 1, 3, 0, 1, 3, 0, 1, 2, 3};

// How many parts have a product at a point, and which of them a part is.
constexpr int parts_at(int point) { return point == 2 ? 1 : PARTS; }
constexpr int place_at(int point, int part) { return point == 2 ? 0 : part; }
// Where values u and v of the two dimensions go: the position of their points, and the column there of channel k of so many.
constexpr int position_of(int u, int v) { return 4 * POINT_OF[u] + POINT_OF[v]; }
GP_INLINE int64_t column_of(int u, int v, int64_t k, int64_t channels) {
  const int i = POINT_OF[u], j = POINT_OF[v];
  return (place_at(i, PART_OF[u]) * parts_at(j) + place_at(j, PART_OF[v])) * channels + k;
}

// to[v * step] = (G g)[v] of the taps g[t * stride].
GP_INLINE void transform_taps(const V* g, int stride, V* to, int step) {
  GP_UNROLL for (int part = 0; part < 2; part++) {
    const V a = g[4 * part * stride], b = g[(4 * part + 2) * stride];
    to[3 * part * step] = a;
    to[(3 * part + 1) * step] = a + b;
    to[(3 * part + 2) * step] = b;
  }
  const V a = g[stride], b = g[3 * stride], c = g[5 * stride];
  to[6 * step] = a;
  to[7 * step] = 0.5f * (a + c + b);
  to[8 * step] = 0.5f * (a + c - b);
  to[9 * step] = c;
}

// to[v * step] = (B^T d)[v] of the nine pixels d[i].
GP_INLINE void transform_pixels(const V* d, V* to, int step) {
  GP_UNROLL for (int part = 0; part < 2; part++) {
    const V *a = d + 4 * part, middle = a[2];
    to[3 * part * step] = a[0] - middle;
    to[(3 * part + 1) * step] = middle;
    to[(3 * part + 2) * step] = a[4] - middle;
  }
  to[6 * step] = d[1] - d[5];
  to[7 * step] = d[3] + d[5];
  to[8 * step] = d[5] - d[3];
  to[9 * step] = d[7] - d[3];
}

// to[p * position + (r - r0) * pitch + column] = the transformed weights of active rows [r0, r1), a vector of rows at once.
GP_INLINE void transform_kernels(const Layer& l, int64_t r0, int64_t r1, float* to, int64_t pitch, int64_t position) {
  for (int64_t r = r0; r < r1; r += L)
    for (int64_t k = 0; k < l.channels; k++) {
      V g[49], w[7 * VALUES], values[VALUES];
      const float* row[L];
      for (int i = 0; i < L; i++) row[i] = row_of(l, std::min(r + i, r1 - 1)) + 49 * l.columns[k];
      for (int t = 0; t < 49; t++)
        GP_UNROLL for (int i = 0; i < L; i++) g[t][i] = row[i][t];
      for (int j = 0; j < 7; j++) transform_taps(g + j, 7, w + j, 7);
      for (int u = 0; u < VALUES; u++) {
        transform_taps(w + 7 * u, 1, values, 1);
        for (int v = 0; v < VALUES; v++) {
          float* at = to + position_of(u, v) * position + (r - r0) * pitch + column_of(u, v, k, l.channels);
          for (int64_t n = 0; n < std::min<int64_t>(L, r1 - r); n++) at[n * pitch] = values[v][n];
        }
      }
    }
}

// to[p * position + (column * NV + v) * L] = the transformed pixels of a panel of tiles.
template <int NV>
GP_TARGET static void transform_tiles(const Layer& l, const Gather& g, float* to, int64_t position) {
  for (int64_t k = 0; k < l.channels; k++)
    for (int n = 0; n < NV; n++) {
      const float* from = l.x + k * l.plane;
      const Piece *first = g.piece + g.begin[n], *end = g.piece + g.begin[n + 1];
      V w[VALUES * 9];
      for (int j = 0; j < 9; j++) {
        const int64_t* offset = l.tap_offset + j;
        V d[9];
        GP_UNROLL for (int i = 0; i < 9; i++) d[i] = load(from + offset[9 * i] + first->offset);
        for (const Piece* p = first + 1; p < end; p++)
          GP_UNROLL for (int i = 0; i < 9; i++) d[i] = load_over(d[i], from + offset[9 * i] + p->offset, p->lanes);
        transform_pixels(d, w + j, 9);
      }
      for (int u = 0; u < VALUES; u++) {
        V values[VALUES];
        transform_pixels(w + 9 * u, values, 1);
        GP_UNROLL for (int v = 0; v < VALUES; v++)
          *(V*)(to + position_of(u, v) * position + (column_of(u, v, k, l.channels) * NV + n) * L) = values[v];
      }
    }
}

// Where a position's values lie: floats from one to the next, of weights, of a panel, and of the products of a tile's rows.
struct PhasesPlan {
  int64_t pitch, weights, panel, products;
  PhasesPlan(int64_t channels, int64_t rows)
      : pitch(whole_vectors(PARTS * PARTS * channels)),
        weights(rows * pitch + APART),
        panel(PANEL * PARTS * PARTS * channels + APART),
        products(TILE_VECTORS * L + APART) {}
};

static int64_t phases_scratch(int64_t channels, int64_t rows) {
  const PhasesPlan how(channels, rows);
  return 16 * (how.weights + how.panel + how.products) + rows * L;
}

GP_TARGET static void phases(const Winograd& c, int64_t h0, int64_t h1, int64_t r0, int64_t r1, float* memory,
                             float* sums) {
  static const TileTable tiles;
  const Layer& l = c.layer;
  Range later = l.ahead;
  const int64_t rows = r1 - r0, begin = h0 * l.width, end = h1 * l.width;
  const PhasesPlan how(l.channels, rows);
  float *totals = memory, *weights = totals + rows * L, *packed = weights + 16 * how.weights,
        *products = packed + 16 * how.panel;
  std::vector<int32_t> identity(PARTS * PARTS * l.channels);
  std::iota(identity.begin(), identity.end(), 0);
  if (sums) std::memset(totals, 0, rows * L * sizeof(float));
  transform_kernels(l, r0, r1, weights, how.pitch, how.weights);
  const Panels panels = split((end - begin + L - 1) / L);
  for (int64_t q = 0; q < panels.count; q++) {
    const int64_t n0 = begin + panels.start(q) * L;
    const int nv = panels.vectors(q), tall = TILE_ROWS[nv];
    Gather gather;
    Places places[GP_MAX_NV];
    plan(l, n0, nv, gather);
    for (int v = 0; v < nv; v++) plan_out(c, n0 + v * L, end, places[v]);
    GP_OF_WIDTH(nv, transform_tiles, l, gather, packed, how.panel);
    for (int64_t r = 0; r < rows; r += tall) {
      const int height = int(std::min<int64_t>(tall, rows - r));
      for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
          const int64_t p = 4 * i + j, depth = parts_at(i) * parts_at(j) * l.channels;
          const float* row[16];
          for (int h = 0; h < height; h++) row[h] = weights + p * how.weights + (r + h) * how.pitch;
          Fetch fetch;  // where a row's pixels will be written, in two rows of the map
          if (p < height) {
            const float* to = l.y + (r0 + r + p) * l.ldy + places[0].place[0].at;
            fetch = {reinterpret_cast<const char*>(to), 8, c.out_width * 4, cache_lines(2 * nv * L)};
          }
          tiles.of[0][nv][height](row, identity.data(), depth, packed + p * how.panel, products + p * how.products, true,
                                  nullptr, nullptr, Goal{nullptr, 0, 0, nullptr, fetch, take(later, depth)});
        }
      transform_out(c, products, how.products, r0 + r, r0 + r + height, nv, places,
                    sums ? totals + r * L : nullptr);
    }
  }
  if (sums)
    for (int64_t r = r0; r < r1; r++) sums[r] += hsum(*(const V*)(totals + (r - r0) * L));
}
