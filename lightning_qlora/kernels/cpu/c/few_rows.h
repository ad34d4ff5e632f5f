/* A layer, y = x W^T + bias + s (x A^T) B^T, for few rows of x: W is decoded into registers (with AVX-512 for more than
   four rows into the L1 cache) and never written to memory. With AVX-512 in every type, with AVX2 and NEON in fp32. The
   products are in fp32 for every type: vdpbf16ps was as fast for one row, and slower for more (Intel Xeon with AMX). */
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__)) || defined(__aarch64__)
enum { GROUP = 32, MOST_TOGETHER = 4 }; /* weights that are decoded together (library.py), rows of x that are multiplied */
enum { STEP = 256, MOST_ROWS = 64 }; /* weights of a row in the L1 cache, rows of x in a call (library.py) */

/* Three sets of instructions. OUTPUTS rows of W are multiplied together. `look_up_group` gives the levels of 32 codes, of
   each 2 EVEN the even ones first. `table_of` makes what it reads: with AVX-512, where the 16 levels fit one register, for
   each block with its scale. Else the scale of a block multiplies the sum of its products. */
#if defined(__AVX512F__)
enum { LANES = 16, EVEN = 16, OUTPUTS = 4, TABLE_HAS_SCALE = 1 };
typedef __m512 Lanes;
typedef __m512 Table;

static inline Lanes zeros(void) { return _mm512_setzero_ps(); }
static inline Lanes all(float f) { return _mm512_set1_ps(f); }
static inline Lanes read(const float *x) { return _mm512_loadu_ps(x); }
static inline Lanes add_product(Lanes total, Lanes a, Lanes b) { return _mm512_fmadd_ps(a, b, total); }
static inline float sum_of(Lanes v) { return _mm512_reduce_add_ps(v); }

static inline Lanes rounded(Lanes f, int type) {
#ifdef __AVX512BF16__ /* may turn denormal numbers into zero */
    if (type == BF16) return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(f)), 16);
#endif
    if (type == BF16) return (Lanes)(bf16_words((Floats)f) << 16);
    if (type == FP16) return _mm512_cvtph_ps(_mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
    return f;
}

static inline Table table_of(const float *levels, float scale, int type) {
    return rounded(_mm512_mul_ps(read(levels), all(scale)), type);
}

static inline void look_up_group(const uint8_t *bytes, const Table *table, Lanes *out) {
    __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes));
    out[0] = _mm512_permutexvar_ps(_mm512_srli_epi32(byte, 4), *table);
    out[1] = _mm512_permutexvar_ps(byte, *table); /* four bits of each index are read */
}
#else
/* The levels are looked up byte by byte: plane[i] has byte i of each of the 16 levels, one instruction looks 16 or 32
   codes up in it, and interleaving the four results gives fp32. */
enum { EVEN = 4, OUTPUTS = 1, TABLE_HAS_SCALE = 0 };
#ifdef __AVX2__
enum { LANES = 8 };
typedef __m256 Lanes;
typedef struct { __m256i plane[4]; } Table;

static inline Lanes zeros(void) { return _mm256_setzero_ps(); }
static inline Lanes all(float f) { return _mm256_set1_ps(f); }
static inline Lanes read(const float *x) { return _mm256_loadu_ps(x); }
static inline Lanes add_product(Lanes total, Lanes a, Lanes b) { return _mm256_fmadd_ps(a, b, total); }

static inline float sum_of(Lanes v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static inline Table table_of(const float *levels, float scale, int type) {
    Table table;
    for (int i = 0; i < 4; i++) {
        uint8_t bytes[16];
        for (int k = 0; k < 16; k++) bytes[k] = to_bits(levels[k]) >> (8 * i);
        table.plane[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes));
    }
    return table;
}

static inline void look_up_group(const uint8_t *bytes, const Table *table, Lanes *out) {
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes));
    __m256i shift = _mm256_setr_epi32(4, 4, 4, 4, 0, 0, 0, 0); /* the high halves, then the low halves */
    __m256i code = _mm256_and_si256(_mm256_srlv_epi32(both, shift), _mm256_set1_epi8(15));
    __m256i byte[4];
    for (int i = 0; i < 4; i++) byte[i] = _mm256_shuffle_epi8(table->plane[i], code);
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
typedef uint8x16x4_t Table;

static inline Lanes zeros(void) { return vdupq_n_f32(0); }
static inline Lanes all(float f) { return vdupq_n_f32(f); }
static inline Lanes read(const float *x) { return vld1q_f32(x); }
static inline Lanes add_product(Lanes total, Lanes a, Lanes b) { return vfmaq_f32(total, a, b); }
static inline float sum_of(Lanes v) { return vaddvq_f32(v); }
static inline Table table_of(const float *levels, float scale, int type) { return vld4q_u8((const uint8_t *)levels); }

static inline void look_up_half(uint8x16_t code, const Table *table, Lanes *out) { /* every second of `out` */
    uint8x16_t byte[4];
    for (int i = 0; i < 4; i++) byte[i] = vqtbl1q_u8(table->val[i], code);
    uint16x8_t low = vreinterpretq_u16_u8(vzip1q_u8(byte[0], byte[1]));
    uint16x8_t high = vreinterpretq_u16_u8(vzip1q_u8(byte[2], byte[3]));
    out[0] = vreinterpretq_f32_u16(vzip1q_u16(low, high));
    out[2] = vreinterpretq_f32_u16(vzip2q_u16(low, high));
    low = vreinterpretq_u16_u8(vzip2q_u8(byte[0], byte[1]));
    high = vreinterpretq_u16_u8(vzip2q_u8(byte[2], byte[3]));
    out[4] = vreinterpretq_f32_u16(vzip1q_u16(low, high));
    out[6] = vreinterpretq_f32_u16(vzip2q_u16(low, high));
}

static inline void look_up_group(const uint8_t *bytes, const Table *table, Lanes *out) {
    uint8x16_t byte = vld1q_u8(bytes);
    look_up_half(vshrq_n_u8(byte, 4), table, out);
    look_up_half(vandq_u8(byte, vdupq_n_u8(15)), table, out + 1);
}
#endif
static inline Lanes rounded(Lanes f, int type) { return f; } /* only fp32 */
#endif

typedef struct { /* a call of `lora_linear` */
    const Weight *w;
    const float *x;  /* [rows, in], with `even_before_odd` */
    void *y;
    int type;
    const void *bias;
    int bias_type;
    const float *xa; /* [rows, r], times the scaling */
    const float *b;
    int64_t r;
    Table levels;
} Layer;

/* x in fp32 with the even ones of each 2 EVEN numbers before the odd ones, as `look_up_group` gives the weights. */
static void even_before_odd(float *out, const void *x, int type, int64_t n) {
    for (int64_t i = 0; i < n; i += 2 * EVEN)
        for (int k = 0; k < EVEN; k++) {
            out[i + k] = load(x, i + 2 * k, type);
            out[i + EVEN + k] = load(x, i + 2 * k + 1, type);
        }
}

/* Adds the products of `rows` rows of x, from `first` on, and OUTPUTS rows of W, whose first weights are `begin`. */
static inline __attribute__((always_inline)) void add_products(const int rows, const Layer *layer, int64_t first,
                                                               const int64_t *begin, Lanes (*total)[OUTPUTS]) {
    const Weight *w = layer->w;
    const float *x = layer->x + first * w->columns;
    int64_t block = (int64_t)1 << w->block_shift, run = w->columns % block ? GROUP : block; /* weights of one scale */
    for (int64_t k = 0; k < w->columns; k += run) {
        float scale[OUTPUTS];
        Table table[OUTPUTS];
        Lanes sums[MOST_TOGETHER][OUTPUTS];
        for (int j = 0; j < OUTPUTS; j++) {
            scale[j] = scale_of_block(w, (begin[j] + k) >> w->block_shift);
            table[j] = TABLE_HAS_SCALE ? table_of(w->levels, scale[j], layer->type) : layer->levels;
        }
        for (int m = 0; m < rows; m++)
            for (int j = 0; j < OUTPUTS; j++) sums[m][j] = TABLE_HAS_SCALE ? total[m][j] : zeros();
        for (int64_t g = k; g < k + run; g += GROUP) {
            Lanes weights[OUTPUTS][GROUP / LANES];
            for (int j = 0; j < OUTPUTS; j++) {
                __builtin_prefetch(w->packed + ((begin[j] + OUTPUTS * w->columns + g) >> 1)); /* of the next outputs */
                look_up_group(w->packed + ((begin[j] + g) >> 1), &table[j], weights[j]);
            }
            for (int m = 0; m < rows; m++)
                for (int i = 0; i < GROUP / LANES; i++) {
                    Lanes here = read(x + m * w->columns + g + i * LANES);
                    for (int j = 0; j < OUTPUTS; j++) sums[m][j] = add_product(sums[m][j], weights[j][i], here);
                }
        }
        for (int m = 0; m < rows; m++)
            for (int j = 0; j < OUTPUTS; j++)
                total[m][j] = TABLE_HAS_SCALE ? sums[m][j] : add_product(total[m][j], all(scale[j]), sums[m][j]);
    }
}

/* Adds the adapter and the bias to the sums of `rows` rows and OUTPUTS outputs, and stores them. */
static inline __attribute__((always_inline)) void finish(const int rows, const Layer *layer, int64_t first,
                                                         int64_t output, Lanes (*total)[OUTPUTS]) {
    const Weight *w = layer->w;
    int64_t r = layer->r, whole = r / LANES * LANES;
    for (int j = 0; j < OUTPUTS && output + j < w->rows; j++) {
        const float *xa = layer->xa + first * r, *b = layer->b + (output + j) * r;
        for (int64_t k = 0; k < whole; k += LANES) {
            Lanes values = rounded(read(b + k), layer->type);
            for (int m = 0; m < rows; m++) total[m][j] = add_product(total[m][j], values, read(xa + m * r + k));
        }
        for (int m = 0; m < rows; m++) {
            float sum = sum_of(total[m][j]);
            for (int64_t k = whole; k < r; k++) sum += xa[m * r + k] * to_type(b[k], layer->type);
            if (layer->bias) sum += load(layer->bias, output + j, layer->bias_type);
            store(layer->y, (first + m) * w->rows + output + j, layer->type, sum);
        }
    }
}

/* y for `rows` rows, from `first` on, and OUTPUTS outputs, from `output` on. */
static inline __attribute__((always_inline)) void some_rows(const int rows, const Layer *layer, int64_t first,
                                                            int64_t output, const int64_t *begin) {
    Lanes total[MOST_TOGETHER][OUTPUTS];
    for (int m = 0; m < rows; m++)
        for (int j = 0; j < OUTPUTS; j++) total[m][j] = zeros();
    add_products(rows, layer, first, begin, total);
    finish(rows, layer, first, output, total);
}

/* y for all rows, more than four, and OUTPUTS outputs: STEP weights of each are decoded for all rows. If the number of
   rows is no multiple of four, the last four contain rows of the four before, which are computed twice. */
static void many_rows(const Layer *layer, int64_t rows, int64_t output, const int64_t *begin) {
    const Weight *w = layer->w;
    int64_t block = (int64_t)1 << w->block_shift, run = w->columns % block ? GROUP : min64(block, STEP);
    Lanes total[MOST_ROWS][OUTPUTS], tile[OUTPUTS][STEP / LANES];
    memset(total, 0, sizeof total[0] * ((rows + 3) / 4 * 4));
    for (int64_t k = 0; k < w->columns; k += STEP) {
        int64_t n = min64(STEP, w->columns - k);
        for (int j = 0; j < OUTPUTS; j++)
            for (int64_t i = 0; i < n; i += run) {
                float scale = scale_of_block(w, (begin[j] + k + i) >> w->block_shift);
                Table table = table_of(w->levels, scale, layer->type);
                for (int64_t g = i; g < i + run; g += GROUP)
                    look_up_group(w->packed + ((begin[j] + k + g) >> 1), &table, &tile[j][g / LANES]);
            }
        for (int64_t m = 0; m < rows; m += 4) {
            const float *x = layer->x + min64(m, rows - 4) * w->columns + k;
            Lanes sums[4][OUTPUTS];
            memcpy(sums, total[m], sizeof sums);
            for (int64_t v = 0; v < n / LANES; v++)
                for (int i = 0; i < 4; i++) {
                    Lanes here = read(x + i * w->columns + v * LANES);
                    for (int j = 0; j < OUTPUTS; j++) sums[i][j] = add_product(sums[i][j], tile[j][v], here);
                }
            memcpy(total[m], sums, sizeof sums);
        }
    }
    for (int64_t m = 0; m < rows; m += 4) finish(4, layer, min64(m, rows - 4), output, total + m);
}

/* The inner products of the row `x` and of up to four rows of a [., n], rounded to a type. */
static void inner_products(const float *x, const float *a, int type, int64_t rows, int64_t n, float *out) {
    Lanes total[4] = {zeros(), zeros(), zeros(), zeros()};
    int64_t k = 0;
    const float *row[4];
    for (int i = 0; i < 4; i++) row[i] = a + min64(i, rows - 1) * n;
    for (; k + LANES <= n; k += LANES) {
        Lanes here = read(x + k);
        for (int i = 0; i < 4; i++) total[i] = add_product(total[i], here, rounded(read(row[i] + k), type));
    }
    for (int64_t i = 0; i < rows; i++) {
        float sum = sum_of(total[i]);
        for (int64_t rest = k; rest < n; rest++) sum += x[rest] * to_type(row[i][rest], type);
        out[i] = sum;
    }
}

/* y [rows, out] = x [rows, in] W^T + bias + scaling xa B^T, summed in fp32 and rounded once, with W [out, in], `in` a
   multiple of GROUP, and B [out, r], which is rounded to the type of x; bias [out] may be NULL. xa [rows, r] is x A^T in
   the type of x; if it is NULL it is computed with A [r, in]. workspace: rows (2 in + r) floats. */
void lora_linear(const Weight *w, const void *x, void *y, int type, int64_t rows, const void *bias, int bias_type,
                 const void *xa, const float *a, const float *b, int64_t r, float scaling, float *workspace,
                 int threads) {
    int64_t n = rows * w->columns;
    float *in = workspace, *projected = in + n, *floats = projected + rows * r;
    Layer layer = {w, in, y, type, bias, bias_type, projected, b, r, table_of(w->levels, 1, FP32)};
    if (!xa) {
        for (int64_t i = 0; i < n; i++) floats[i] = load(x, i, type);
        for (int64_t m = 0; m < rows; m++)
            for (int64_t i = 0; i < r; i += 4)
                inner_products(floats + m * w->columns, a + i * w->columns, type, min64(4, r - i), w->columns,
                               projected + m * r + i);
    }
    for (int64_t i = 0; i < rows * r; i++) projected[i] = scaling * (xa ? load(xa, i, type) : to_type(projected[i], type));
    even_before_odd(in, x, type, n);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t output = 0; output < w->rows; output += OUTPUTS) {
        int64_t begin[OUTPUTS], m = 0;
        for (int j = 0; j < OUTPUTS; j++) begin[j] = min64(output + j, w->rows - 1) * w->columns;
        if (TABLE_HAS_SCALE && rows > 4) {
            many_rows(&layer, rows, output, begin);
            continue;
        }
        for (; m + 4 <= rows; m += 4) some_rows(4, &layer, m, output, begin);
        if (rows - m == 3) some_rows(3, &layer, m, output, begin);
        if (rows - m == 2) some_rows(2, &layer, m, output, begin);
        if (rows - m == 1) some_rows(1, &layer, m, output, begin);
    }
}
#endif
