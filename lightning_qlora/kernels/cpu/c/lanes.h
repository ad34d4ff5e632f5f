/* Three sets of instructions. ROWS rows of x are multiplied with a tile together (many_rows.h).

   For few_rows.h, which multiplies OUTPUTS rows of W together, `look_up_group` gives the levels of GROUP codes, of each
   2 EVEN the even ones first. `table_of` makes what it reads: with AVX-512, where the 16 levels fit one register, for each
   block with its scale. Else the scale of a block multiplies the sum of its products. */
enum { GROUP = 32 };

#if defined(__AVX512F__)
enum { LANES = 16, EVEN = 16, OUTPUTS = 4, ROWS = 4, TABLE_HAS_SCALE = 1 };
typedef __m512 Lanes;
typedef __m512 Table;

static inline Lanes zeros(void) { return _mm512_setzero_ps(); }
static inline Lanes all(float f) { return _mm512_set1_ps(f); }
static inline Lanes read(const float *x) { return _mm512_loadu_ps(x); }
static inline Lanes add_product(Lanes total, Lanes a, Lanes b) { return _mm512_fmadd_ps(a, b, total); }
static inline float sum_of(Lanes v) { return _mm512_reduce_add_ps(v); }

static inline void sums_of_four(const Lanes *v, float *out) {
    /* Each step adds what it interleaves: after two of them, a quarter of the register has the four sums of its lanes. */
    __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    __m512d c = (__m512d)a, d = (__m512d)b;
    __m512 four = _mm512_add_ps((__m512)_mm512_unpacklo_pd(c, d), (__m512)_mm512_unpackhi_pd(c, d));
    __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define PAIRS /* two numbers in bf16 to a lane, multiplied exactly and added in fp32; denormal numbers count as zero */
static inline Lanes add_pairs(Lanes total, Lanes a, Lanes b) {
    return _mm512_dpbf16_ps(total, (__m512bh)a, (__m512bh)b);
}
#endif

static inline Lanes rounded(Lanes f, int type) {
    if (type == FP32) return f;
    if (type == FP16) return _mm512_cvtph_ps(_mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
#ifdef __AVX512BF16__ /* may turn denormal numbers into zero */
    return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(f)), 16);
#else
    return (Lanes)(bf16_words((Floats)f) << 16);
#endif
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
enum { LANES = 8, ROWS = 3 };
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

static inline void sums_of_four(const Lanes *v, float *out) {
    __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
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
enum { LANES = 4, ROWS = 4 };
typedef float32x4_t Lanes;
typedef uint8x16x4_t Table;

static inline Lanes zeros(void) { return vdupq_n_f32(0); }
static inline Lanes all(float f) { return vdupq_n_f32(f); }
static inline Lanes read(const float *x) { return vld1q_f32(x); }
static inline Lanes add_product(Lanes total, Lanes a, Lanes b) { return vfmaq_f32(total, a, b); }
static inline float sum_of(Lanes v) { return vaddvq_f32(v); }
static inline void sums_of_four(const Lanes *v, float *out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3])));
}
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
static inline Lanes rounded(Lanes f, int type) {
    if (type != FP32)
        for (int i = 0; i < LANES; i++) f[i] = to_type(f[i], type);
    return f;
}
#endif

#ifndef PAIRS
static inline Lanes add_pairs(Lanes total, Lanes a, Lanes b) { return total; } /* is not called */
#endif

/* A value that stays in a register: gcc, if it compiles for AMD, would read it again for each product. */
static inline Lanes read_once(const float *x) {
    Lanes values = read(x);
#ifdef __aarch64__
    __asm__("" : "+w"(values));
#else
    __asm__("" : "+v"(values));
#endif
    return values;
}
