/* The product of the backward pass, x += y W, for few rows; compare matmul.h. */
#ifdef __AVX512F__
enum { STRIP = 128, DEPTH = 32 }; /* columns (one cache line of codes) and rows of a tile of W */

/* Up to four rows of y [., stride] times a tile [DEPTH, STRIP], with 16 vectors of sums in registers at a time. */
static inline __attribute__((always_inline)) void strip_rows_fp32(const int rows, const float *y, int64_t stride,
                                                                  const float *tile, Floats (*sums)[STRIP / LANES]) {
    for (int c = 0; c < STRIP / LANES; c += 4) {
        Floats total[4][4];
        for (int m = 0; m < rows; m++)
            for (int v = 0; v < 4; v++) total[m][v] = sums[m][c + v];
        for (int d = 0; d < DEPTH; d++)
            for (int m = 0; m < rows; m++)
                for (int v = 0; v < 4; v++) {
                    const float *w = tile + d * STRIP + (c + v) * LANES;
                    total[m][v] = (Floats)_mm512_fmadd_ps(_mm512_set1_ps(y[m * stride + d]), _mm512_loadu_ps(w),
                                                          (__m512)total[m][v]);
                }
        for (int m = 0; m < rows; m++)
            for (int v = 0; v < 4; v++) sums[m][c + v] = total[m][v];
    }
}

/* The column of the strip that belongs to element e of vector v of the sums. */
static inline int64_t column_fp32(int64_t v, int64_t e) { return v * LANES + e; }

#ifdef __AVX512BF16__
static inline __attribute__((always_inline)) void strip_rows_bf16(const int rows, const uint16_t *y, int64_t stride,
                                                                  const uint16_t *tile,
                                                                  Floats (*sums)[STRIP / LANES]) {
    for (int c = 0; c < STRIP / LANES; c += 4) {
        Floats total[4][4];
        for (int m = 0; m < rows; m++)
            for (int v = 0; v < 4; v++) total[m][v] = sums[m][c + v];
        for (int d = 0; d < DEPTH; d += 2) { /* the instruction adds pairs, so two rows of W are interleaved */
            __m512i pair[4];
            for (int h = 0; h < 2; h++) {
                const uint16_t *w = tile + d * STRIP + (c + 2 * h) * LANES;
                __m512i one = _mm512_loadu_si512(w), two = _mm512_loadu_si512(w + STRIP);
                pair[2 * h] = _mm512_unpacklo_epi16(one, two);
                pair[2 * h + 1] = _mm512_unpackhi_epi16(one, two);
            }
            for (int m = 0; m < rows; m++) {
                int32_t two;
                memcpy(&two, y + m * stride + d, 4);
                for (int v = 0; v < 4; v++)
                    total[m][v] = (Floats)_mm512_dpbf16_ps((__m512)total[m][v], (__m512bh)_mm512_set1_epi32(two),
                                                           (__m512bh)pair[v]);
            }
        }
        for (int m = 0; m < rows; m++)
            for (int v = 0; v < 4; v++) sums[m][c + v] = total[m][v];
    }
}

static inline int64_t column_bf16(int64_t v, int64_t e) { /* unpacklo and unpackhi take four of every eight columns */
    return (v >> 1) * 32 + (e >> 2) * 8 + (v & 1) * 4 + (e & 3);
}

static inline int64_t column_bf16_split(int64_t v, int64_t e) { /* of every 64 columns the even ones come first */
    int64_t at = column_bf16(v, e);
    return (at & ~63) + 2 * (at & 31) + ((at >> 5) & 1);
}
#endif

/* The columns [k, k + STRIP) of x [rows, w->columns] += y W. */
#define DEFINE_STRIP(NAME, T, DECODE, STRIP_ROWS, COLUMN)                                                       \
    static void NAME(const Weight *w, const T *y, int64_t stride, int64_t rows, int64_t k, void *x, int type) { \
        T tile[DEPTH * STRIP] __attribute__((aligned(64)));                                                     \
        Floats sums[MOST_ROWS][STRIP / LANES];                                                                  \
        int64_t width = min64(STRIP, w->columns - k);                                                           \
        memset(sums, 0, sizeof(sums[0]) * rows);                                                                \
        for (int64_t o = 0; o < w->rows; o += DEPTH) {                                                          \
            int64_t present = min64(DEPTH, w->rows - o), m = rows;                                              \
            if (present < DEPTH || width < STRIP) memset(tile, 0, sizeof tile);                                 \
            for (int64_t d = 0; d < present; d++) {                                                             \
                int64_t begin = (o + d) * w->columns + k;                                                       \
                __builtin_prefetch(w->packed + (begin + DEPTH * w->columns) / 2); /* the next tile's */         \
                DECODE(w, begin, begin + width, tile + d * STRIP);                                              \
            }                                                                                                   \
            const T *from = y + o;                                                                              \
            Floats(*to)[STRIP / LANES] = sums;                                                                  \
            for (; m >= 4; m -= 4, from += 4 * stride, to += 4) STRIP_ROWS(4, from, stride, tile, to);          \
            for (; m >= 1; m -= 1, from += stride, to += 1) STRIP_ROWS(1, from, stride, tile, to);              \
        }                                                                                                       \
        for (int64_t m = 0; m < rows; m++)                                                                      \
            for (int64_t v = 0; v < STRIP / LANES; v++)                                                         \
                for (int64_t e = 0; e < LANES; e++) {                                                           \
                    int64_t c = COLUMN(v, e), at = m * w->columns + k + c;                                      \
                    if (c < width) store(x, at, type, load(x, at, type) + sums[m][v][e]);                       \
                }                                                                                               \
    }

DEFINE_STRIP(strip_fp32, float, decode_fp32, strip_rows_fp32, column_fp32)
DEFINE_STRIP(strip_fp16, float, decode_fp16_as_fp32, strip_rows_fp32, column_fp32)
#ifdef __AVX512BF16__
DEFINE_STRIP(strip_bf16, uint16_t, decode_bf16, strip_rows_bf16, column_bf16)
DEFINE_STRIP(strip_bf16_split, uint16_t, decode_bf16_split, strip_rows_bf16, column_bf16_split)
#else
DEFINE_STRIP(strip_bf16, float, decode_bf16_as_fp32, strip_rows_fp32, column_fp32)
#endif

/* x [rows, w->columns] += y [rows, w->rows] W; workspace: 4 bytes per element of the padded y. */
void add_matmul_transposed(const Weight *w, const void *y, void *x, int type, int64_t rows, void *workspace,
                           int threads) {
    int64_t stride = (w->rows + STEP - 1) / STEP * STEP, strips = (w->columns + STRIP - 1) / STRIP;
    const void *in = padded_rows(y, type, rows, w->rows, stride, workspace);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < strips; p++) {
        int64_t k = p * STRIP;
        if (type == FP32) strip_fp32(w, in, stride, rows, k, x, type);
        else if (type == FP16) strip_fp16(w, in, stride, rows, k, x, type);
#ifdef __AVX512BF16__
        else if (uses_split(w, type)) strip_bf16_split(w, in, stride, rows, k, x, type);
#endif
        else strip_bf16(w, in, stride, rows, k, x, type);
    }
}
#endif
