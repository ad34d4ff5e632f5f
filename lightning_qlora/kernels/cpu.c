/* The CPU's loops: decode, quantize, multiply a few rows, drop out. Built on first use by build.py, called by native.py.

   A block of weights has one scale, so it has only 16 values: each loop makes that table of 16 once per block, rounded to
   the type it computes in (level * scale in fp32, then one rounding, as in reference.py), and then only looks codes up.

   -ffp-contract=off (build.py) keeps code * scale and + offset two roundings, as the format wants them. */
#include <stdint.h>
#include <string.h>
#ifdef __SSSE3__
#include <immintrin.h>
#endif

enum { FP32, BF16, FP16 };

typedef struct { /* native.py, class Weight: the same fields in the same order */
    const uint8_t *packed;   /* two codes a byte, the first in the high half */
    const void *absmax;      /* uint8 codes of the scales, or fp32 scales where nested is NULL */
    const float *nested;     /* a second-level scale for every 256 scales */
    const float *levels;     /* [16] */
    const float *dynamic;    /* [256], levels of the scales' codes */
    const float *offset;     /* what is added to every scale; not read where nested is NULL */
    int64_t rows, columns;
    int64_t block_shift;     /* log2 of the block size */
} Weight;

static inline float from_bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

static inline float from_bf16(uint16_t h) { return from_bits((uint32_t)h << 16); }
static inline uint16_t to_bf16(float f) { /* to nearest even; NaN stays NaN */
    uint32_t u = to_bits(f);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

#ifdef __FLT16_MANT_DIG__
static inline float from_fp16(uint16_t h) { _Float16 f; memcpy(&f, &h, 2); return (float)f; }
static inline uint16_t to_fp16(float f) { _Float16 g = (_Float16)f; uint16_t h; memcpy(&h, &g, 2); return h; }
#else /* a compiler without _Float16: native.py keeps fp16 away (has_fp16) */
static inline float from_fp16(uint16_t h) { return (float)h; }
static inline uint16_t to_fp16(float f) { return (uint16_t)f; }
#endif

int has_fp16(void) {
#ifdef __FLT16_MANT_DIG__
    return 1;
#else
    return 0;
#endif
}

int has_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

const char *form(void) {
#if defined(__AVX512BW__) && defined(__AVX512BF16__)
    return "AVX-512 with bf16";
#elif defined(__AVX512BW__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#else
    return "plain C";
#endif
}

/* ---- decode ------------------------------------------------------------------------------------------------------ */

static inline float scale_of_block(const Weight *w, int64_t block) {
    if (!w->nested) return ((const float *)w->absmax)[block];
    return w->dynamic[((const uint8_t *)w->absmax)[block]] * w->nested[block >> 8] + *w->offset;
}

/* A block's table of 16: level * scale in fp32, rounded to the type; as whole vectors, which compilers do not make of a
   loop of 16 that they have unrolled. The 16-bit tables stand there twice: see look_up_16. */
typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));

static inline Words bf16_words(Floats f) { /* to_bf16, 16 at once */
    Words u = (Words)f, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    Words is_nan = (Words)((u & 0x7fffffff) > 0x7f800000);
    return (is_nan & 0x7fc0) | (~is_nan & rounded & 0xffff);
}

static inline void table_fp32(float *table, const float *levels, float scale) {
    *(Floats *)table = *(const Floats *)levels * scale;
}

static inline void table_bf16(uint16_t *table, const float *levels, float scale) {
#ifdef __AVX512BF16__
    if (scale > 1e-35f) { /* the instruction makes zeros of denormal numbers, so it must not meet any */
        __m512 product = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scale));
        _mm512_storeu_si512(table, (__m512i)_mm512_cvtne2ps_pbh(product, product));
        return;
    }
#endif
    Halves rounded = __builtin_convertvector(bf16_words(*(const Floats *)levels * scale), Halves);
    *(Halves *)table = *(Halves *)(table + 16) = rounded;
}

static inline void table_bf16_as_fp32(float *table, const float *levels, float scale) {
    *(Words *)table = bf16_words(*(const Floats *)levels * scale) << 16;
}

static inline void table_fp16(uint16_t *table, const float *levels, float scale) {
#ifdef __AVX512F__
    __m512 product = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scale));
    __m256i rounded = _mm512_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm512_storeu_si512(table, _mm512_broadcast_i64x4(rounded));
#else
    for (int k = 0; k < 16; k++) table[k] = table[k + 16] = to_fp16(levels[k] * scale);
#endif
}

static inline void table_fp16_as_fp32(float *table, const float *levels, float scale) {
    uint16_t halves[32];
    table_fp16(halves, levels, scale);
    for (int k = 0; k < 16; k++) table[k] = from_fp16(halves[k]);
}

/* Looks up 2n codes, n a multiple of 16 bytes (32 codes) for the vector forms; out[i] = table[code[i]]. */
static inline void look_up_16(uint16_t *out, const uint8_t *bytes, int64_t n, const uint16_t *table) {
    int64_t i = 0;
#if defined(__AVX512BW__)
    __m512i both = _mm512_loadu_si512(table);
    for (; i + 16 <= n; i += 16) {
        __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(bytes + i)));
        /* vpermw reads five bits of each index; the table stands there twice, so the fifth does not matter */
        __m512i code = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
        _mm512_storeu_si512(out + 2 * i, _mm512_permutexvar_epi16(code, both));
    }
#elif defined(__SSSE3__)
    __m128i low_bits = _mm_set1_epi16(0xff), nibble = _mm_set1_epi8(15);
    __m128i a = _mm_loadu_si128((const __m128i *)table), b = _mm_loadu_si128((const __m128i *)(table + 8));
    __m128i low = _mm_packus_epi16(_mm_and_si128(a, low_bits), _mm_and_si128(b, low_bits));
    __m128i high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
    for (; i + 16 <= n; i += 16) {
        __m128i byte = _mm_loadu_si128((const __m128i *)(bytes + i));
        __m128i first = _mm_and_si128(_mm_srli_epi16(byte, 4), nibble), second = _mm_and_si128(byte, nibble);
        __m128i code[2] = {_mm_unpacklo_epi8(first, second), _mm_unpackhi_epi8(first, second)};
        for (int k = 0; k < 2; k++) {
            __m128i l = _mm_shuffle_epi8(low, code[k]), h = _mm_shuffle_epi8(high, code[k]);
            __m128i *to = (__m128i *)(out + 2 * i + 16 * k);
            _mm_storeu_si128(to, _mm_unpacklo_epi8(l, h));
            _mm_storeu_si128(to + 1, _mm_unpackhi_epi8(l, h));
        }
    }
#endif
    for (; i < n; i++) out[2 * i] = table[bytes[i] >> 4], out[2 * i + 1] = table[bytes[i] & 15];
}

static inline void look_up_32(float *out, const uint8_t *bytes, int64_t n, const float *table) {
    int64_t i = 0;
#if defined(__AVX512F__)
    __m512 all = _mm512_loadu_ps(table);
    for (; i + 8 <= n; i += 8) {
        __m128i byte = _mm_loadl_epi64((const __m128i *)(bytes + i));
        /* vpermps reads four bits of each index, so the high half of a byte need not be masked off */
        __m128i code = _mm_unpacklo_epi8(_mm_srli_epi16(byte, 4), byte);
        _mm512_storeu_ps(out + 2 * i, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(code), all));
    }
#elif defined(__AVX2__)
    __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    for (; i + 4 <= n; i += 4) {
        int32_t four;
        memcpy(&four, bytes + i, 4);
        __m128i byte = _mm_cvtsi32_si128(four);
        __m256i code = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(_mm_srli_epi16(byte, 4), byte));
        __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)); /* bit 3 as the sign */
        _mm256_storeu_ps(out + 2 * i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code),
                                                       _mm256_permutevar8x32_ps(high, code), is_high));
    }
#endif
    for (; i < n; i++) out[2 * i] = table[bytes[i] >> 4], out[2 * i + 1] = table[bytes[i] & 15];
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Decodes the weights [begin, end) of the flat weight to out[0 .. end - begin). Rows may begin in the middle of a byte.
   T is the type a weight is stored in: fp32 holds a weight rounded to bf16 as well. */
#define DEFINE_DECODE(NAME, T, TABLE, LOOK_UP)                                                                  \
    static inline void NAME(const Weight *w, int64_t begin, int64_t end, T *out) {                              \
        for (int64_t i = begin; i < end;) {                                                                     \
            int64_t block = i >> w->block_shift, stop = least(end, (block + 1) << w->block_shift);              \
            T table[32] __attribute__((aligned(64)));                                                           \
            TABLE(table, w->levels, scale_of_block(w, block));                                                  \
            if (i & 1) *out++ = table[w->packed[i++ >> 1] & 15];                                                \
            LOOK_UP(out, w->packed + (i >> 1), (stop - i) >> 1, table);                                         \
            if (i < stop && ((stop - i) & 1)) out[stop - i - 1] = table[w->packed[(stop - 1) >> 1] >> 4];       \
            out += stop - i;                                                                                    \
            i = stop;                                                                                           \
        }                                                                                                       \
    }

DEFINE_DECODE(decode_fp32, float, table_fp32, look_up_32)
DEFINE_DECODE(decode_bf16, uint16_t, table_bf16, look_up_16)
DEFINE_DECODE(decode_fp16, uint16_t, table_fp16, look_up_16)
DEFINE_DECODE(decode_bf16_as_fp32, float, table_bf16_as_fp32, look_up_32)
DEFINE_DECODE(decode_fp16_as_fp32, float, table_fp16_as_fp32, look_up_32)

enum { PIECE = 1 << 14 }; /* weights a thread takes at a time; a multiple of every block size */

void dequantize(const Weight *w, void *out, int type, int threads) {
    int64_t n = w->rows * w->columns, pieces = (n + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && pieces > 2)
    for (int64_t p = 0; p < pieces; p++) {
        int64_t begin = p * PIECE, end = least(n, begin + PIECE);
        if (type == FP32) decode_fp32(w, begin, end, (float *)out + begin);
        else if (type == BF16) decode_bf16(w, begin, end, (uint16_t *)out + begin);
        else decode_fp16(w, begin, end, (uint16_t *)out + begin);
    }
}

/* ---- multiply a few rows: y += x W^T, with a tile of W in the L1 cache instead of W in memory -------------------- */

enum { TILE_ROWS = 4, TILE_BYTES = 4096, LANES = 16, STEP = 64, MOST_ROWS = 64 }; /* native.py: STEP, MOST_ROWS */
#define TILE_COLUMNS(T) (TILE_BYTES / (int64_t)sizeof(T))
#define TILE_STRIDE(T) (TILE_COLUMNS(T) + 64 / (int64_t)sizeof(T)) /* rows 4096 bytes apart would share cache lines */

static inline float sum(Floats v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    float part[4] = {0};
    for (int i = 0; i < LANES; i++) part[i & 3] += v[i];
    return (part[0] + part[1]) + (part[2] + part[3]);
#endif
}

static inline Floats step_fp32(Floats total, const float *x, const float *w) {
#ifdef __AVX512F__
    return (Floats)_mm512_fmadd_ps(_mm512_loadu_ps(x), _mm512_loadu_ps(w), (__m512)total);
#else
    return total + *(const Floats *)x * *(const Floats *)w;
#endif
}

#ifdef __AVX512BF16__
static inline Floats step_bf16(Floats total, const uint16_t *x, const uint16_t *w) {
    return (Floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_loadu_si512(x), (__m512bh)_mm512_loadu_si512(w));
}
#endif

/* Up to four rows of x [., stride] times TILE_ROWS rows of W: 16 vectors of sums, held in registers meanwhile. */
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

/* The sums of all rows of x for rows [first, first + n) of W, n <= TILE_ROWS. */
#define DEFINE_TILES(NAME, T, DECODE, PRODUCT)                                                                   \
    static void NAME(const Weight *w, const T *x, int64_t stride, int64_t rows, int64_t first, int64_t n,        \
                     Floats (*sums)[TILE_ROWS]) {                                                                \
        T tile[TILE_ROWS * TILE_STRIDE(T)]  __attribute__((aligned(64)));                                        \
        memset(sums, 0, sizeof(*sums) * rows);                                                                   \
        for (int64_t k = 0; k < w->columns; k += TILE_COLUMNS(T)) {                                              \
            int64_t width = least(TILE_COLUMNS(T), w->columns - k), padded = (width + STEP - 1) / STEP * STEP;   \
            for (int64_t j = 0; j < TILE_ROWS; j++) {                                                            \
                int64_t known = j < n ? width : 0, begin = (first + j) * w->columns + k;                         \
                DECODE(w, begin, begin + known, tile + j * TILE_STRIDE(T));                                     \
                memset(tile + j * TILE_STRIDE(T) + known, 0, sizeof(T) * (padded - known));                     \
            }                                                                                                    \
            PRODUCT(rows, x + k, stride, tile, padded, sums);                                                    \
        }                                                                                                        \
    }

DEFINE_PRODUCT(product_fp32, float, step_fp32)
DEFINE_TILES(tiles_fp32, float, decode_fp32, product_fp32)
DEFINE_TILES(tiles_fp16, float, decode_fp16_as_fp32, product_fp32)
#ifdef __AVX512BF16__
/* The 64 weights from i on, of one block: the even ones and the odd ones, which takes half of the instructions that
   their own order would. padded_rows puts the input in the same order, so the sums are the same. */
static inline __attribute__((always_inline)) void decode_64_split(const Weight *w, int64_t i, __m512i *even,
                                                                  __m512i *odd) {
    uint16_t table[32] __attribute__((aligned(64)));
    table_bf16(table, w->levels, scale_of_block(w, i >> w->block_shift));
    __m512i both = _mm512_load_si512(table);
    __m512i byte = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(w->packed + (i >> 1))));
    *even = _mm512_permutexvar_epi16(_mm512_srli_epi16(byte, 4), both);
    *odd = _mm512_permutexvar_epi16(byte, both);
}

static inline void prefetch_next_tile(const Weight *w, int64_t i) {
    __builtin_prefetch(w->packed + (i + TILE_ROWS * w->columns) / 2);
}

static inline void decode_bf16_split(const Weight *w, int64_t begin, int64_t end, uint16_t *out) {
    for (int64_t i = begin; i < end; i += 64, out += 64) {
        __m512i even, odd;
        prefetch_next_tile(w, i);
        decode_64_split(w, i, &even, &odd);
        _mm512_storeu_si512(out, even);
        _mm512_storeu_si512(out + 32, odd);
    }
}

/* One row of x: no tile at all, the weights go from register to sum. */
static void one_row_bf16_split(const Weight *w, const uint16_t *x, int64_t first, Floats *sums) {
    __m512 a[TILE_ROWS] = {0}, b[TILE_ROWS] = {0};
    for (int64_t k = 0; k < w->columns; k += 64) {
        __m512bh even_x = (__m512bh)_mm512_loadu_si512(x + k), odd_x = (__m512bh)_mm512_loadu_si512(x + k + 32);
        for (int j = 0; j < TILE_ROWS; j++) {
            __m512i even, odd;
            prefetch_next_tile(w, (first + j) * w->columns + k);
            decode_64_split(w, (first + j) * w->columns + k, &even, &odd);
            a[j] = _mm512_dpbf16_ps(a[j], even_x, (__m512bh)even);
            b[j] = _mm512_dpbf16_ps(b[j], odd_x, (__m512bh)odd);
        }
    }
    for (int j = 0; j < TILE_ROWS; j++) sums[j] = (Floats)_mm512_add_ps(a[j], b[j]);
}

static int splits(const Weight *w, int type) { return type == BF16 && w->columns % 64 == 0 && w->block_shift >= 6; }

static void split(uint16_t *out, const uint16_t *x, int64_t n) { /* n a multiple of 64 */
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
DEFINE_TILES(tiles_bf16, uint16_t, decode_bf16, product_bf16)
DEFINE_TILES(tiles_bf16_split, uint16_t, decode_bf16_split, product_bf16)
#else
DEFINE_TILES(tiles_bf16, float, decode_bf16_as_fp32, product_fp32)
#endif

static inline float load(const void *x, int64_t i, int type) {
    if (type == FP32) return ((const float *)x)[i];
    uint16_t h = ((const uint16_t *)x)[i];
    return type == BF16 ? from_bf16(h) : from_fp16(h);
}

static inline void store(void *x, int64_t i, int type, float f) {
    if (type == FP32) ((float *)x)[i] = f;
    else ((uint16_t *)x)[i] = type == BF16 ? to_bf16(f) : to_fp16(f);
}

/* Rows of x [., columns], each padded with zeros to a multiple of STEP, in the type that the products take. */
static const void *padded_rows(const void *x, int type, int64_t rows, int64_t columns, int64_t stride, void *room) {
#ifdef __AVX512BF16__
    if (type == BF16) {
        memset(room, 0, 2 * rows * stride);
        for (int64_t m = 0; m < rows; m++)
            memcpy((uint16_t *)room + m * stride, (const uint16_t *)x + m * columns, 2 * columns);
        return room;
    }
#endif
    if (type == FP32 && stride == columns) return x;
    memset(room, 0, 4 * rows * stride);
    for (int64_t m = 0; m < rows; m++)
        for (int64_t k = 0; k < columns; k++) ((float *)room)[m * stride + k] = load(x, m * columns + k, type);
    return room;
}

/* y [rows, w->rows] += x [rows, w->columns] W^T; room: 4 bytes for each element of the padded x. */
void add_matmul(const Weight *w, const void *x, void *y, int type, int64_t rows, void *room, int threads) {
    int64_t stride = (w->columns + STEP - 1) / STEP * STEP, tiles = (w->rows + TILE_ROWS - 1) / TILE_ROWS;
    const void *in = room;
#ifdef __AVX512BF16__
    if (splits(w, type)) split(room, x, rows * stride);
    else
#endif
        in = padded_rows(x, type, rows, w->columns, stride, room);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tiles; t++) {
        int64_t first = t * TILE_ROWS, n = least(TILE_ROWS, w->rows - first);
        Floats sums[MOST_ROWS][TILE_ROWS];
        if (type == FP32) tiles_fp32(w, in, stride, rows, first, n, sums);
        else if (type == FP16) tiles_fp16(w, in, stride, rows, first, n, sums);
#ifdef __AVX512BF16__
        else if (splits(w, type) && rows == 1 && n == TILE_ROWS) one_row_bf16_split(w, in, first, sums[0]);
        else if (splits(w, type)) tiles_bf16_split(w, in, stride, rows, first, n, sums);
#endif
        else tiles_bf16(w, in, stride, rows, first, n, sums);
        for (int64_t m = 0; m < rows; m++)
            for (int64_t j = 0; j < n; j++) {
                int64_t at = m * w->rows + first + j;
                store(y, at, type, load(y, at, type) + sum(sums[m][j]));
            }
    }
}

/* ---- the same for the gradient: x += y W ------------------------------------------------------------------------- */

enum { STRIP = 128, DEPTH = 32 }; /* columns (a cache line of codes) and rows of W in a tile */

/* Up to four rows of y [., stride] times a tile [DEPTH, STRIP]: each step 16 vectors of sums, held in registers. */
static inline __attribute__((always_inline)) void spread_fp32_rows(const int rows, const float *y, int64_t stride,
                                                                   const float *tile, Floats (*sums)[STRIP / LANES]) {
    for (int c = 0; c < STRIP / LANES; c += 4) {
        Floats total[4][4];
        for (int m = 0; m < rows; m++)
            for (int v = 0; v < 4; v++) total[m][v] = sums[m][c + v];
        for (int d = 0; d < DEPTH; d++)
            for (int m = 0; m < rows; m++)
                for (int v = 0; v < 4; v++) {
                    const float *w = tile + d * STRIP + (c + v) * LANES;
#ifdef __AVX512F__
                    total[m][v] = (Floats)_mm512_fmadd_ps(_mm512_set1_ps(y[m * stride + d]), _mm512_loadu_ps(w),
                                                          (__m512)total[m][v]);
#else
                    total[m][v] += y[m * stride + d] * *(const Floats *)w;
#endif
                }
        for (int m = 0; m < rows; m++)
            for (int v = 0; v < 4; v++) sums[m][c + v] = total[m][v];
    }
}

/* Where a sum's column lies in its strip: vector v, element e. */
static inline int64_t column_fp32(int64_t v, int64_t e) { return v * LANES + e; }

#ifdef __AVX512BF16__
static inline __attribute__((always_inline)) void spread_bf16_rows(const int rows, const uint16_t *y, int64_t stride,
                                                                   const uint16_t *tile,
                                                                   Floats (*sums)[STRIP / LANES]) {
    for (int c = 0; c < STRIP / LANES; c += 4) {
        Floats total[4][4];
        for (int m = 0; m < rows; m++)
            for (int v = 0; v < 4; v++) total[m][v] = sums[m][c + v];
        for (int d = 0; d < DEPTH; d += 2) { /* the instruction sums over pairs, so two rows of W are interleaved */
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

static inline int64_t column_bf16(int64_t v, int64_t e) { /* unpacklo and unpackhi take four of every eight */
    return (v >> 1) * 32 + (e >> 2) * 8 + (v & 1) * 4 + (e & 3);
}

static inline int64_t column_bf16_split(int64_t v, int64_t e) { /* of every 64 the even ones come first */
    int64_t at = column_bf16(v, e);
    return (at & ~63) + 2 * (at & 31) + ((at >> 5) & 1);
}
#endif

/* The columns [k, k + STRIP) of x [rows, w->columns] += y W. */
#define DEFINE_STRIP(NAME, T, DECODE, SPREAD_ROWS, COLUMN)                                                       \
    static void NAME(const Weight *w, const T *y, int64_t stride, int64_t rows, int64_t k, void *x, int type) {  \
        T tile[DEPTH * STRIP] __attribute__((aligned(64)));                                                      \
        Floats sums[MOST_ROWS][STRIP / LANES];                                                                   \
        int64_t width = least(STRIP, w->columns - k);                                                            \
        memset(sums, 0, sizeof(sums[0]) * rows);                                                                 \
        for (int64_t o = 0; o < w->rows; o += DEPTH) {                                                           \
            int64_t known = least(DEPTH, w->rows - o), m = rows;                                                 \
            if (known < DEPTH || width < STRIP) memset(tile, 0, sizeof tile);                                    \
            for (int64_t d = 0; d < known; d++) {                                                                \
                int64_t begin = (o + d) * w->columns + k;                                                        \
                __builtin_prefetch(w->packed + (begin + DEPTH * w->columns) / 2); /* the next tile's */          \
                DECODE(w, begin, begin + width, tile + d * STRIP);                                               \
            }                                                                                                    \
            const T *from = y + o;                                                                               \
            Floats(*to)[STRIP / LANES] = sums;                                                                   \
            for (; m >= 4; m -= 4, from += 4 * stride, to += 4) SPREAD_ROWS(4, from, stride, tile, to);          \
            for (; m >= 1; m -= 1, from += stride, to += 1) SPREAD_ROWS(1, from, stride, tile, to);              \
        }                                                                                                        \
        for (int64_t m = 0; m < rows; m++)                                                                       \
            for (int64_t v = 0; v < STRIP / LANES; v++)                                                          \
                for (int64_t e = 0; e < LANES; e++) {                                                            \
                    int64_t c = COLUMN(v, e), at = m * w->columns + k + c;                                       \
                    if (c < width) store(x, at, type, load(x, at, type) + sums[m][v][e]);                        \
                }                                                                                                \
    }

DEFINE_STRIP(strip_fp32, float, decode_fp32, spread_fp32_rows, column_fp32)
DEFINE_STRIP(strip_fp16, float, decode_fp16_as_fp32, spread_fp32_rows, column_fp32)
#ifdef __AVX512BF16__
DEFINE_STRIP(strip_bf16, uint16_t, decode_bf16, spread_bf16_rows, column_bf16)
DEFINE_STRIP(strip_bf16_split, uint16_t, decode_bf16_split, spread_bf16_rows, column_bf16_split)
#else
DEFINE_STRIP(strip_bf16, float, decode_bf16_as_fp32, spread_fp32_rows, column_fp32)
#endif

/* x [rows, w->columns] += y [rows, w->rows] W; room: 4 bytes for each element of the padded y. */
void add_matmul_transposed(const Weight *w, const void *y, void *x, int type, int64_t rows, void *room, int threads) {
    int64_t stride = (w->rows + STEP - 1) / STEP * STEP, strips = (w->columns + STRIP - 1) / STRIP;
    const void *in = padded_rows(y, type, rows, w->rows, stride, room);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < strips; p++) {
        int64_t k = p * STRIP;
        if (type == FP32) strip_fp32(w, in, stride, rows, k, x, type);
        else if (type == FP16) strip_fp16(w, in, stride, rows, k, x, type);
#ifdef __AVX512BF16__
        else if (splits(w, type)) strip_bf16_split(w, in, stride, rows, k, x, type);
#endif
        else strip_bf16(w, in, stride, rows, k, x, type);
    }
}

/* ---- quantize ---------------------------------------------------------------------------------------------------- */

enum { MOST = 4096 }; /* the largest block */

static void quantize_block(const void *x, int type, int64_t begin, int64_t n, int whole, const float *bounds,
                           const uint8_t *order, uint8_t *packed, float *absmax) {
    float value[MOST + 1];
    int32_t code[MOST + 1], most = 0;
    if (type == FP32) memcpy(value, (const float *)x + begin, 4 * n);
    else if (type == BF16) for (int64_t i = 0; i < n; i++) value[i] = from_bf16(((const uint16_t *)x)[begin + i]);
    else for (int64_t i = 0; i < n; i++) value[i] = from_fp16(((const uint16_t *)x)[begin + i]);
    for (int64_t i = 0; i < n; i++) { /* magnitudes of fp32 numbers are ordered as their bits are */
        int32_t magnitude = to_bits(value[i]) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    float scale = from_bits(most), at_least = scale > 1e-38f ? scale : 1e-38f, inverse = 1.0f / at_least;
    *absmax = whole ? scale : at_least; /* quantize/blockwise.py: whole blocks multiply, the short last one divides */
    for (int64_t i = 0; i < n; i++) value[i] = whole ? value[i] * inverse : value[i] / at_least;
    value[n] = 0; /* fills the last byte of an odd number of weights */
    int64_t bytes = (n + 1) / 2;
    memset(code, 0, sizeof(int32_t) * 2 * bytes);
    for (int k = 0; k < 15; k++)
        for (int64_t i = 0; i < 2 * bytes; i++) code[i] += value[i] > bounds[k];
    for (int64_t i = 0; i < bytes; i++) packed[i] = order[code[2 * i]] << 4 | order[code[2 * i + 1]];
}

/* Blocks of the flat x [n] to codes, packed [ceil(n / 2)], and scales, absmax [ceil(n / 2^shift)]. */
void quantize(const void *x, int type, int64_t n, int64_t shift, const float *bounds, const uint8_t *order,
              uint8_t *packed, float *absmax, int threads) {
    int64_t size = (int64_t)1 << shift, blocks = (n + size - 1) >> shift;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && n > 2 * PIECE)
    for (int64_t b = 0; b < blocks; b++) {
        int64_t begin = b << shift, here = least(size, n - begin);
        quantize_block(x, type, begin, here, here == size, bounds, order, packed + begin / 2, absmax + b);
    }
}

/* Scales [n] to 8-bit codes and nested scales [ceil(n / 256)]; code_of_grid [65536]: quantize/blockwise.py. */
void quantize_scales(const float *absmax, int64_t n, float offset, const uint8_t *code_of_grid, uint8_t *codes,
                     float *nested) {
    for (int64_t begin = 0; begin < n; begin += 256) {
        int64_t here = least(256, n - begin);
        float value[256], most = 0;
        for (int64_t i = 0; i < here; i++) {
            value[i] = absmax[begin + i] - offset;
            float magnitude = from_bits(to_bits(value[i]) & 0x7fffffff);
            most = magnitude > most ? magnitude : most;
        }
        float inverse = 1.0f / most;
        nested[begin >> 8] = most;
        for (int64_t i = 0; i < here; i++) {
            float scaled = value[i] * inverse;
            scaled = scaled < -1 ? -1 : scaled > 1 ? 1 : scaled;
            float place = (scaled + 1.0f) * 0.5f * 65535.0f + 0.5f;
            /* not a number, where inf times zero made one: the lowest place */
            codes[begin + i] = most == 0 ? 0 : code_of_grid[place > 0 ? (int32_t)place : 0];
        }
    }
}

/* ---- drop out ---------------------------------------------------------------------------------------------------- */

static inline uint32_t mix(uint32_t h) { /* reference.py, _mix */
    h = (h ^ (h >> 16)) * 0x7feb352dU;
    h = (h ^ (h >> 15)) * 0x846ca68bU;
    return h ^ (h >> 16);
}

/* out[i] = x[i] * scale where the hash of i and seed is at least `least_kept`, else 0; in place where out is x. */
void dropout(const void *x, void *out, int type, int64_t n, int64_t seed, int32_t least_kept, float scale,
             int threads) {
    uint32_t low = (uint32_t)seed, high = (uint32_t)(seed >> 32);
    int64_t pieces = (n + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && pieces > 2)
    for (int64_t p = 0; p < pieces; p++) {
        int64_t begin = p * PIECE, end = least(n, begin + PIECE);
#define EACH(TYPE)                                                                            \
    for (int64_t i = begin; i < end; i++) {                                                   \
        int keep = (int32_t)mix(mix((uint32_t)i + low) ^ high) >= least_kept;                 \
        store(out, i, TYPE, keep ? load(x, i, TYPE) * scale : 0.0f);                          \
    }
        if (type == FP32) EACH(FP32)
        else if (type == BF16) EACH(BF16)
        else EACH(FP16)
#undef EACH
    }
}
