/* A layer, y = x W^T + bias + s (x A^T) B^T, for few rows of x: W is decoded tile by tile into the L1 cache and never
   written to memory. With AVX-512; few_rows.h is for AVX2 and NEON. */
#ifdef __AVX512F__
enum { TILE_ROWS = 4, TILE_BYTES = 4096, LANES = 16, STEP = 64, MOST_ROWS = 64 }; /* also in library.py */
#define TILE_COLUMNS(T) (TILE_BYTES / (int64_t)sizeof(T))
#define TILE_STRIDE(T) (TILE_COLUMNS(T) + 64 / (int64_t)sizeof(T)) /* rows 4096 bytes apart would share cache lines */

/* The sums of the elements of four vectors; a third of the instructions of four separate sums. */
static inline __m128 sums_of_four(const Floats v[4]) {
    __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); /* per four lanes: a b a b */
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee)); /* a b c d */
    __m128 low = _mm_add_ps(_mm512_castps512_ps128(all), _mm512_extractf32x4_ps(all, 1));
    return _mm_add_ps(low, _mm_add_ps(_mm512_extractf32x4_ps(all, 2), _mm512_extractf32x4_ps(all, 3)));
}

static inline Floats step_fp32(Floats total, const float *x, const float *w) {
    return (Floats)_mm512_fmadd_ps(_mm512_loadu_ps(x), _mm512_loadu_ps(w), (__m512)total);
}

#ifdef __AVX512BF16__
static inline __m512 products_bf16(__m512 total, const uint16_t *x, __m512i w) {
    return _mm512_dpbf16_ps(total, (__m512bh)_mm512_loadu_si512(x), (__m512bh)w);
}

static inline Floats step_bf16(Floats total, const uint16_t *x, const uint16_t *w) {
    return (Floats)products_bf16((__m512)total, x, _mm512_loadu_si512(w));
}
#endif

/* Up to four rows of x [., stride] times TILE_ROWS rows of W: 16 vectors of sums, which stay in registers. */
#define DEFINE_PRODUCT(NAME, T, STEP_FUNCTION)                                                                   \
    static inline __attribute__((always_inline)) void NAME##_rows(                                               \
        const int rows, const T *x, int64_t stride, const T *tile, int64_t columns, Floats (*sums)[TILE_ROWS]) { \
        Floats total[4][TILE_ROWS];                                                                              \
        for (int m = 0; m < rows; m++)                                                                           \
            for (int j = 0; j < TILE_ROWS; j++) total[m][j] = sums[m][j];                                        \
        for (int64_t k = 0; k < columns; k += 64 / sizeof(T))                                                    \
            for (int m = 0; m < rows; m++)                                                                       \
                for (int j = 0; j < TILE_ROWS; j++)                                                              \
                    total[m][j] = STEP_FUNCTION(total[m][j], x + m * stride + k, tile + j * TILE_STRIDE(T) + k); \
        for (int m = 0; m < rows; m++)                                                                           \
            for (int j = 0; j < TILE_ROWS; j++) sums[m][j] = total[m][j];                                        \
    }                                                                                                            \
    static void NAME(int64_t rows, const T *x, int64_t stride, const T *tile, int64_t columns,                   \
                     Floats (*sums)[TILE_ROWS]) {                                                                \
        for (; rows >= 4; rows -= 4, x += 4 * stride, sums += 4)                                                 \
            NAME##_rows(4, x, stride, tile, columns, sums);                                                      \
        if (rows == 3) NAME##_rows(3, x, stride, tile, columns, sums);                                           \
        if (rows == 2) NAME##_rows(2, x, stride, tile, columns, sums);                                           \
        if (rows == 1) NAME##_rows(1, x, stride, tile, columns, sums);                                           \
    }

/* The sums for all rows of x and the rows [first, first + n) of w, a Weight or a Matrix, n <= TILE_ROWS. */
#define DEFINE_TILES(NAME, SOURCE, T, DECODE, PRODUCT)                                                         \
    static void NAME(const SOURCE *w, const T *x, int64_t stride, int64_t rows, int64_t first, int64_t n,      \
                     Floats (*sums)[TILE_ROWS]) {                                                              \
        T tile[TILE_ROWS * TILE_STRIDE(T)] __attribute__((aligned(64)));                                       \
        memset(sums, 0, sizeof(*sums) * rows);                                                                 \
        for (int64_t k = 0; k < w->columns; k += TILE_COLUMNS(T)) {                                            \
            int64_t width = min64(TILE_COLUMNS(T), w->columns - k), padded = (width + STEP - 1) / STEP * STEP; \
            for (int64_t j = 0; j < TILE_ROWS; j++) {                                                          \
                int64_t present = j < n ? width : 0, begin = (first + j) * w->columns + k;                     \
                DECODE(w, begin, begin + present, tile + j * TILE_STRIDE(T));                                  \
                memset(tile + j * TILE_STRIDE(T) + present, 0, sizeof(T) * (padded - present));                \
            }                                                                                                  \
            PRODUCT(rows, x + k, stride, tile, padded, sums);                                                  \
        }                                                                                                      \
    }

DEFINE_PRODUCT(product_fp32, float, step_fp32)
DEFINE_TILES(tiles_fp32, Weight, float, decode_fp32, product_fp32)
DEFINE_TILES(tiles_fp16, Weight, float, decode_fp16_as_fp32, product_fp32)
#ifdef __AVX512BF16__
/* 64 weights of one block, the even ones and the odd ones apart: half of the instructions of the original order.
   `split_even_odd` puts the input into the same order, so the sums are the same. */
static inline __attribute__((always_inline)) void decode_64_split(const Weight *w, const uint8_t *bytes, float scale,
                                                                  __m512i *even, __m512i *odd) {
    /* as table_bf16, but denormal numbers may become zero: the products treat them as zero anyway */
    __m512 product = _mm512_mul_ps(_mm512_loadu_ps(w->levels), _mm512_set1_ps(scale));
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(product, product);
    __m512i byte = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)bytes));
    __builtin_prefetch(bytes + TILE_ROWS * w->columns / 2); /* the same columns of the next tile */
    *even = _mm512_permutexvar_epi16(_mm512_srli_epi16(byte, 4), both);
    *odd = _mm512_permutexvar_epi16(byte, both);
}

enum { GROUPS = 16 }; /* groups of 64 weights whose scales are looked up together */

static inline int64_t scales_of_groups(const Weight *w, int64_t begin, int64_t end, float *scales) {
    int64_t n = min64(GROUPS, (end - begin) >> 6);
    for (int64_t g = 0; g < n; g++) scales[g] = scale_of_block(w, (begin + 64 * g) >> w->block_shift);
    return n;
}

static inline void decode_bf16_split(const Weight *w, int64_t begin, int64_t end, uint16_t *out) {
    float scales[GROUPS];
    for (int64_t n; begin < end; begin += 64 * n) {
        n = scales_of_groups(w, begin, end, scales);
        for (int64_t g = 0; g < n; g++, out += 64) {
            __m512i even, odd;
            decode_64_split(w, w->packed + (begin >> 1) + 32 * g, scales[g], &even, &odd);
            _mm512_storeu_si512(out, even);
            _mm512_storeu_si512(out + 32, odd);
        }
    }
}

/* Up to four rows of x and `n` rows of W, without a tile: the decoded weights stay in registers. */
static inline __attribute__((always_inline)) void in_registers(const int rows, const int n, const Weight *w,
                                                               const uint16_t *x, int64_t first, int j0,
                                                               Floats (*sums)[TILE_ROWS]) {
    __m512 total[4][TILE_ROWS][2] = {0}; /* sums of the even and of the odd weights */
    float scales[TILE_ROWS][GROUPS];
    int64_t begin = (first + j0) * w->columns;
    for (int64_t k = 0, groups; k < w->columns; k += 64 * groups) {
        for (int j = 0; j < n; j++)
            groups = scales_of_groups(w, begin + j * w->columns + k, begin + (j + 1) * w->columns, scales[j]);
        for (int64_t g = 0; g < groups; g++) {
            const uint8_t *bytes = w->packed + ((begin + k) >> 1) + 32 * g;
            const uint16_t *here = x + k + 64 * g;
            for (int j = 0; j < n; j++) {
                __m512i even, odd;
                decode_64_split(w, bytes + j * w->columns / 2, scales[j][g], &even, &odd);
                for (int m = 0; m < rows; m++) {
                    const uint16_t *of_row = here + m * w->columns;
                    total[m][j][0] = products_bf16(total[m][j][0], of_row, even);
                    total[m][j][1] = products_bf16(total[m][j][1], of_row + 32, odd);
                }
            }
        }
    }
    for (int m = 0; m < rows; m++)
        for (int j = 0; j < n; j++) sums[m][j0 + j] = (Floats)_mm512_add_ps(total[m][j][0], total[m][j][1]);
}

/* Sums of up to four rows of x and the TILE_ROWS rows of W from `first` on, with at most 16 sums in registers. */
static void few_rows_bf16_split(int64_t rows, const Weight *w, const uint16_t *x, int64_t first,
                                Floats (*sums)[TILE_ROWS]) {
    if (rows == 1) in_registers(1, 4, w, x, first, 0, sums);
    else if (rows == 2) in_registers(2, 4, w, x, first, 0, sums);
    else for (int j = 0; j < TILE_ROWS; j += 2) {
        if (rows == 3) in_registers(3, 2, w, x, first, j, sums);
        else in_registers(4, 2, w, x, first, j, sums);
    }
}

static int uses_split(const Weight *w, int type) { return type == BF16 && w->columns % 64 == 0 && w->block_shift >= 6; }

static void split_even_odd(uint16_t *out, const uint16_t *x, int64_t n) { /* n a multiple of 64 */
    Words even;
    for (int k = 0; k < LANES; k++) even[k] = 4 * k | (4 * k + 2) << 16;
    __m512i evens = (__m512i)even, odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
    for (int64_t i = 0; i < n; i += 64) {
        __m512i a = _mm512_loadu_si512(x + i), b = _mm512_loadu_si512(x + i + 32);
        _mm512_storeu_si512(out + i, _mm512_permutex2var_epi16(a, evens, b));
        _mm512_storeu_si512(out + i + 32, _mm512_permutex2var_epi16(a, odds, b));
    }
}

DEFINE_PRODUCT(product_bf16, uint16_t, step_bf16)
DEFINE_TILES(tiles_bf16, Weight, uint16_t, decode_bf16, product_bf16)
DEFINE_TILES(tiles_bf16_split, Weight, uint16_t, decode_bf16_split, product_bf16)
#else
DEFINE_TILES(tiles_bf16, Weight, float, decode_bf16_as_fp32, product_fp32)
#endif

/* The rows of x [., columns] as fp32, padded with zeros to `stride`. */
static const float *padded_floats(const void *x, int type, int64_t rows, int64_t columns, int64_t stride,
                                  float *workspace) {
    if (type == FP32 && stride == columns) return x;
    memset(workspace, 0, 4 * rows * stride);
    for (int64_t m = 0; m < rows; m++)
        for (int64_t k = 0; k < columns; k++) workspace[m * stride + k] = load(x, m * columns + k, type);
    return workspace;
}

/* The same in the type and the order that the products with W need. */
static const void *rows_for_products(const Weight *w, const void *x, int type, int64_t rows, int64_t stride,
                                     void *workspace) {
#ifdef __AVX512BF16__
    if (uses_split(w, type)) {
        split_even_odd(workspace, x, rows * stride);
        return workspace;
    }
    if (type == BF16) {
        memset(workspace, 0, 2 * rows * stride);
        for (int64_t m = 0; m < rows; m++)
            memcpy((uint16_t *)workspace + m * stride, (const uint16_t *)x + m * w->columns, 2 * w->columns);
        return workspace;
    }
#endif
    return padded_floats(x, type, rows, w->columns, stride, workspace);
}

/* A or B of an adapter: values in fp32, which become numbers of the type of x when they are read. */
typedef struct {
    const float *values;
    int64_t rows, columns;
    int type;
} Matrix;

static inline Floats rounded(Floats f, int type) {
#ifdef __AVX512BF16__ /* may turn denormal numbers into zero, as the products do */
    if (type == BF16) return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)f)), 16);
#else
    if (type == BF16) return (Floats)(bf16_words(f) << 16);
#endif
    if (type == FP16) return (Floats)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)f, _MM_FROUND_TO_NEAREST_INT));
    return f;
}

/* The values [begin, end) of the flat matrix, at most LANES of them, and zeros. */
static inline Floats rounded_values(const Matrix *a, int64_t begin, int64_t end) {
    __mmask16 present = end - begin < LANES ? (1 << (end - begin)) - 1 : 0xffff;
    return rounded((Floats)_mm512_maskz_loadu_ps(present, a->values + begin), a->type);
}

static inline void read_rounded(const Matrix *a, int64_t begin, int64_t end, float *out) {
    for (; begin < end; begin += LANES, out += LANES) *(Floats *)out = rounded_values(a, begin, end);
}

DEFINE_TILES(tiles_of_matrix, Matrix, float, read_rounded, product_fp32)

/* x A^T in fp32, [rows, padded]; the columns from the rank on are not written. */
static void project(const Matrix *a, const float *x, int64_t stride, int64_t rows, float *xa, int64_t padded) {
    for (int64_t first = 0; first < a->rows; first += TILE_ROWS) {
        int64_t n = min64(TILE_ROWS, a->rows - first);
        Floats sums[MOST_ROWS][TILE_ROWS];
        tiles_of_matrix(a, x, stride, rows, first, n, sums);
        for (int64_t m = 0; m < rows; m++) {
            float total[TILE_ROWS];
            _mm_storeu_ps(total, sums_of_four(sums[m]));
            memcpy(xa + m * padded + first, total, 4 * n);
        }
    }
}

/* Adds the products of xa [rows, padded] and the rows [first, first + n) of B. */
static inline void add_adapter(const Matrix *b, const float *xa, int64_t padded, int64_t rows, int64_t first, int64_t n,
                               Floats (*sums)[TILE_ROWS]) {
    for (int64_t j = 0; j < n; j++) {
        int64_t begin = (first + j) * b->columns;
        for (int64_t k = 0; k < b->columns; k += LANES) {
            Floats values = rounded_values(b, begin + k, begin + b->columns);
            for (int64_t m = 0; m < rows; m++)
                sums[m][j] = step_fp32(sums[m][j], xa + m * padded + k, (const float *)&values);
        }
    }
}

/* y [rows, out] = x [rows, in] W^T + bias + scaling xa B^T, summed in fp32 and rounded once, with W [out, in] and
   B [out, r]; bias [out] may be NULL. xa [rows, r] is x A^T, rounded to the type of x; if it is NULL it is computed with
   A [r, in]. workspace: rows (2 in + r) floats, in and r rounded up to multiples of STEP. */
void lora_linear(const Weight *w, const void *x, void *y, int type, int64_t rows, const void *bias, int bias_type,
                 const void *xa, const float *a, const float *b, int64_t r, float scaling, float *workspace,
                 int threads) {
    int64_t stride = (w->columns + STEP - 1) / STEP * STEP, padded = (r + STEP - 1) / STEP * STEP;
    int64_t tiles = (w->rows + TILE_ROWS - 1) / TILE_ROWS;
    float *projected = workspace + 2 * rows * stride;
    Matrix of_a = {a, r, w->columns, type}, of_b = {b, w->rows, r, type};
    const void *in = rows_for_products(w, x, type, rows, stride, workspace);
    if (r && xa) {
        const float *floats = padded_floats(xa, type, rows, r, padded, projected);
        if (floats != projected) memcpy(projected, floats, 4 * rows * padded);
    } else if (r) {
        memset(projected, 0, 4 * rows * padded);
        const float *floats = padded_floats(x, type, rows, w->columns, stride, workspace + rows * stride);
        project(&of_a, floats, stride, rows, projected, padded);
    }
    for (int64_t i = 0; i < rows * padded; i += LANES)
        *(Floats *)(projected + i) = scaling * rounded(*(Floats *)(projected + i), type);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tiles; t++) {
        int64_t first = t * TILE_ROWS, n = min64(TILE_ROWS, w->rows - first);
        Floats sums[MOST_ROWS][TILE_ROWS];
        if (type == FP32) tiles_fp32(w, in, stride, rows, first, n, sums);
        else if (type == FP16) tiles_fp16(w, in, stride, rows, first, n, sums);
#ifdef __AVX512BF16__
        else if (uses_split(w, type) && rows <= 4 && n == TILE_ROWS) few_rows_bf16_split(rows, w, in, first, sums);
        else if (uses_split(w, type)) tiles_bf16_split(w, in, stride, rows, first, n, sums);
#endif
        else tiles_bf16(w, in, stride, rows, first, n, sums);
        add_adapter(&of_b, projected, padded, rows, first, n, sums);
        for (int64_t m = 0; m < rows; m++) {
            float total[TILE_ROWS];
            _mm_storeu_ps(total, sums_of_four(sums[m]));
            for (int64_t j = 0; j < n; j++) {
                float sum = bias ? total[j] + load(bias, first + j, bias_type) : total[j];
                store(y, m * w->rows + first + j, type, sum);
            }
        }
    }
}
#endif
