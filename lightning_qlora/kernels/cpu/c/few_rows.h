/* A layer in fp32, y = x W^T + bias + s (x A^T) B^T, for few rows of x, with AVX2 or NEON. W is decoded into registers
   and never written to memory.

   The levels are looked up byte by byte: plane[i] has byte i of each of the 16 levels, one instruction looks 16 or 32
   codes up in it, and interleaving the four results gives fp32. The scale of a block multiplies the sum of its products,
   so no table is made for it. */
#if !defined(__AVX512F__) && ((defined(__AVX2__) && defined(__FMA__)) || defined(__aarch64__))
enum { GROUP = 32, MOST_TOGETHER = 4 }; /* weights that are decoded together, rows of x that are multiplied together */

#ifdef __AVX2__
enum { LANES = 8 };
typedef __m256 Lanes;
typedef struct { __m256i plane[4]; } Levels;

static inline Lanes zeros(void) { return _mm256_setzero_ps(); }
static inline Lanes all(float f) { return _mm256_set1_ps(f); }
static inline Lanes read(const float *x) { return _mm256_loadu_ps(x); }
static inline Lanes times(Lanes a, Lanes b) { return _mm256_mul_ps(a, b); }
static inline Lanes add_product(Lanes total, Lanes a, Lanes b) { return _mm256_fmadd_ps(a, b, total); }

static inline float sum_of(Lanes v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static inline Levels planes(const float *levels) {
    Levels table;
    for (int i = 0; i < 4; i++) {
        uint8_t bytes[16];
        for (int k = 0; k < 16; k++) bytes[k] = to_bits(levels[k]) >> (8 * i);
        table.plane[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes));
    }
    return table;
}

/* The levels of 32 codes; of each 8, the four even ones come first. */
static inline void look_up_group(const uint8_t *bytes, const Levels *levels, Lanes *out) {
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes));
    __m256i shift = _mm256_setr_epi32(4, 4, 4, 4, 0, 0, 0, 0); /* the high halves, then the low halves */
    __m256i code = _mm256_and_si256(_mm256_srlv_epi32(both, shift), _mm256_set1_epi8(15));
    __m256i byte[4];
    for (int i = 0; i < 4; i++) byte[i] = _mm256_shuffle_epi8(levels->plane[i], code);
    __m256i low = _mm256_unpacklo_epi8(byte[0], byte[1]), high = _mm256_unpacklo_epi8(byte[2], byte[3]);
    out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high));
    out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high));
    low = _mm256_unpackhi_epi8(byte[0], byte[1]), high = _mm256_unpackhi_epi8(byte[2], byte[3]);
    out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high));
    out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high));
}
#else
enum { LANES = 4 };
typedef float32x4_t Lanes;
typedef uint8x16x4_t Levels;

static inline Lanes zeros(void) { return vdupq_n_f32(0); }
static inline Lanes all(float f) { return vdupq_n_f32(f); }
static inline Lanes read(const float *x) { return vld1q_f32(x); }
static inline Lanes times(Lanes a, Lanes b) { return vmulq_f32(a, b); }
static inline Lanes add_product(Lanes total, Lanes a, Lanes b) { return vfmaq_f32(total, a, b); }
static inline float sum_of(Lanes v) { return vaddvq_f32(v); }
static inline Levels planes(const float *levels) { return vld4q_u8((const uint8_t *)levels); }

static inline void look_up_half(uint8x16_t code, const Levels *levels, Lanes *out) { /* every second of `out` */
    uint8x16_t byte[4];
    for (int i = 0; i < 4; i++) byte[i] = vqtbl1q_u8(levels->val[i], code);
    uint16x8_t low = vreinterpretq_u16_u8(vzip1q_u8(byte[0], byte[1]));
    uint16x8_t high = vreinterpretq_u16_u8(vzip1q_u8(byte[2], byte[3]));
    out[0] = vreinterpretq_f32_u16(vzip1q_u16(low, high));
    out[2] = vreinterpretq_f32_u16(vzip2q_u16(low, high));
    low = vreinterpretq_u16_u8(vzip2q_u8(byte[0], byte[1]));
    high = vreinterpretq_u16_u8(vzip2q_u8(byte[2], byte[3]));
    out[4] = vreinterpretq_f32_u16(vzip1q_u16(low, high));
    out[6] = vreinterpretq_f32_u16(vzip2q_u16(low, high));
}

/* The levels of 32 codes; of each 8, the four even ones come first. */
static inline void look_up_group(const uint8_t *bytes, const Levels *levels, Lanes *out) {
    uint8x16_t byte = vld1q_u8(bytes);
    look_up_half(vshrq_n_u8(byte, 4), levels, out);
    look_up_half(vandq_u8(byte, vdupq_n_u8(15)), levels, out + 1);
}
#endif

/* x with the even ones of each 8 numbers before the odd ones, as `look_up_group` gives the weights. */
static void even_before_odd(float *out, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += 8)
        for (int k = 0; k < 4; k++) out[i + k] = x[i + 2 * k], out[i + 4 + k] = x[i + 2 * k + 1];
}

/* Adds the products of row j of W and `rows` rows of x to `total`; `groups` groups have one scale. */
static inline __attribute__((always_inline)) void add_row_of_weight(const int rows, const int groups, const Weight *w,
                                                                    const Levels *levels, const float *x, int64_t j,
                                                                    Lanes *total) {
    int64_t begin = j * w->columns;
    const uint8_t *bytes = w->packed + (begin >> 1);
    for (int64_t k = 0; k < w->columns; k += groups * GROUP) {
        Lanes sums[MOST_TOGETHER], scale = all(scale_of_block(w, (begin + k) >> w->block_shift));
        for (int g = 0; g < groups; g++, bytes += GROUP / 2) {
            Lanes weights[GROUP / LANES];
            look_up_group(bytes, levels, weights);
            for (int m = 0; m < rows; m++)
                for (int i = 0; i < GROUP / LANES; i++) {
                    Lanes here = read(x + m * w->columns + k + g * GROUP + i * LANES);
                    sums[m] = g || i ? add_product(sums[m], weights[i], here) : times(weights[i], here);
                }
        }
        for (int m = 0; m < rows; m++) total[m] = add_product(total[m], scale, sums[m]);
    }
}

/* The inner products of the row `x` and of up to four rows of a [., n]. */
static void inner_products(const float *x, const float *a, int64_t rows, int64_t n, float *out) {
    Lanes total[4] = {zeros(), zeros(), zeros(), zeros()};
    int64_t k = 0;
    const float *row[4];
    for (int i = 0; i < 4; i++) row[i] = a + min64(i, rows - 1) * n;
    for (; k + LANES <= n; k += LANES) {
        Lanes here = read(x + k);
        for (int i = 0; i < 4; i++) total[i] = add_product(total[i], here, read(row[i] + k));
    }
    for (int64_t i = 0; i < rows; i++) {
        float sum = sum_of(total[i]);
        for (int64_t rest = k; rest < n; rest++) sum += x[rest] * row[i][rest];
        out[i] = sum;
    }
}

typedef struct { /* the arguments of `lora_linear` */
    const Weight *w;
    const void *bias;
    int bias_type;
    const float *b;
    int64_t r;
} Layer;

static inline __attribute__((always_inline)) void some_rows(const int rows, const Layer *layer, const Levels *levels,
                                                            const float *x, const float *xa, int64_t j, float *y) {
    const Weight *w = layer->w;
    Lanes total[MOST_TOGETHER];
    for (int m = 0; m < rows; m++) total[m] = zeros();
    if (w->columns % (2 * GROUP) == 0 && w->block_shift > 5) add_row_of_weight(rows, 2, w, levels, x, j, total);
    else add_row_of_weight(rows, 1, w, levels, x, j, total);
    for (int m = 0; m < rows; m++) {
        float adapter = 0, bias = layer->bias ? load(layer->bias, j, layer->bias_type) : 0;
        if (layer->r) inner_products(xa + m * layer->r, layer->b + j * layer->r, 1, layer->r, &adapter);
        y[m * w->rows + j] = sum_of(total[m]) + adapter + bias;
    }
}

/* y [rows, out] = x [rows, in] W^T + bias + scaling xa B^T in fp32, with W [out, in] in blocks of at least 32, `in` a
   multiple of 32, and B [out, r]; bias [out] may be NULL. xa [rows, r] is x A^T; if it is NULL it is computed with
   A [r, in]. workspace: rows (in + r) floats. */
void lora_linear(const Weight *w, const void *x, void *y, int type, int64_t rows, const void *bias, int bias_type,
                 const void *xa, const float *a, const float *b, int64_t r, float scaling, float *workspace,
                 int threads) {
    Levels levels = planes(w->levels);
    Layer layer = {w, bias, bias_type, b, r};
    float *in = workspace, *projected = workspace + rows * w->columns;
    even_before_odd(in, x, rows * w->columns);
    for (int64_t m = 0; m < rows; m++) {
        float *row = projected + m * r;
        if (xa) memcpy(row, (const float *)xa + m * r, 4 * r);
        else
            for (int64_t i = 0; i < r; i += 4)
                inner_products((const float *)x + m * w->columns, a + i * w->columns, min64(4, r - i), w->columns, row + i);
        for (int64_t i = 0; i < r; i++) row[i] *= scaling;
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t j = 0; j < w->rows; j++) {
        int64_t m = 0;
        float *out = y;
#define SOME_ROWS(N) some_rows(N, &layer, &levels, in + m * w->columns, projected + m * r, j, out + m * w->rows)
        for (; m + 4 <= rows; m += 4) SOME_ROWS(4);
        if (rows - m == 3) SOME_ROWS(3);
        if (rows - m == 2) SOME_ROWS(2);
        if (rows - m == 1) SOME_ROWS(1);
#undef SOME_ROWS
    }
}
#endif
