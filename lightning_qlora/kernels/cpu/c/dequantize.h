/* A 4-bit weight and how it is decoded.

   The weights of a block share one scale, so they have only 16 different values. For each block a table of these 16
   values is computed (level * scale in fp32, rounded once to the output type, as in reference.py). Then the codes are
   looked up.

   -ffp-contract=off (build.py) forbids FMA: scale = code * nested + offset is rounded twice, as in bitsandbytes. */
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__SSSE3__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

enum { FP32, BF16, FP16 };

typedef struct { /* library.py, class _Weight: the same fields in the same order */
    const uint8_t *packed;   /* two codes per byte, the first in the high half */
    const void *absmax;      /* uint8 codes of the scales; fp32 scales if nested is NULL */
    const float *nested;     /* one second-level scale per 256 scales, or NULL */
    const float *levels;     /* [16] */
    const float *dynamic;    /* [256], the levels of the codes of the scales */
    const float *offset;     /* added to every scale; not read if nested is NULL */
    int64_t rows, columns;
    int64_t block_shift;     /* log2 of the block size */
} Weight;

static inline float from_bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

static inline float from_bf16(uint16_t h) { return from_bits((uint32_t)h << 16); }
static inline uint16_t to_bf16(float f) { /* round to nearest even; NaN stays NaN */
    uint32_t u = to_bits(f);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

#ifdef __FLT16_MANT_DIG__
static inline float from_fp16(uint16_t h) { _Float16 f; memcpy(&f, &h, 2); return (float)f; }
static inline uint16_t to_fp16(float f) { _Float16 g = (_Float16)f; uint16_t h; memcpy(&h, &g, 2); return h; }
#else /* a compiler without _Float16: library.py does not call this (has_fp16) */
static inline float from_fp16(uint16_t h) { return (float)h; }
static inline uint16_t to_fp16(float f) { return (uint16_t)f; }
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

static inline float to_type(float f, int type) {
    if (type == FP32) return f;
    return type == BF16 ? from_bf16(to_bf16(f)) : from_fp16(to_fp16(f));
}

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static inline float scale_of_block(const Weight *w, int64_t block) {
    if (!w->nested) return ((const float *)w->absmax)[block];
    return w->dynamic[((const uint8_t *)w->absmax)[block]] * w->nested[block >> 8] + *w->offset;
}

/* The table of a block: the 16 values level * scale in fp32, rounded to the type. Written with vector types, because
   compilers unroll a loop of 16 and then do not vectorize it. The 16-bit tables are stored twice: see look_up_16. */
typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));

static inline Words bf16_words(Floats f) { /* to_bf16 of 16 values */
    Words u = (Words)f, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    Words is_nan = (Words)((Ints)(0x7f800000 - (u & 0x7fffffff)) >> 31); /* with AVX2 gcc compares one by one */
    return (is_nan & 0x7fc0) | (~is_nan & rounded & 0xffff);
}

static inline void table_fp32(float *table, const float *levels, float scale) {
    *(Floats *)table = *(const Floats *)levels * scale;
}

static inline void table_bf16(uint16_t *table, const float *levels, float scale) {
#ifdef __AVX512BF16__
    if (scale > 1e-35f) { /* the instruction flushes denormal numbers to zero, so it is not used for them */
        __m512 product = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scale));
        _mm512_storeu_si512(table, (__m512i)_mm512_cvtne2ps_pbh(product, product));
        return;
    }
#endif
    Halves rounded = __builtin_convertvector(bf16_words(*(const Floats *)levels * scale), Halves);
    *(Halves *)table = *(Halves *)(table + 16) = rounded;
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

#ifdef __aarch64__
static inline uint8x16x2_t codes_of_16(const uint8_t *bytes) { /* the 32 codes of 16 bytes, in order */
    uint8x16_t byte = vld1q_u8(bytes), first = vshrq_n_u8(byte, 4), second = vandq_u8(byte, vdupq_n_u8(15));
    return (uint8x16x2_t){{vzip1q_u8(first, second), vzip2q_u8(first, second)}};
}
#endif

static inline void table_bf16_in_fp32(float *table, const float *levels, float scale) {
    *(Words *)table = bf16_words(*(const Floats *)levels * scale) << 16;
}

static inline void table_fp16_in_fp32(float *table, const float *levels, float scale) {
    for (int k = 0; k < 16; k++) table[k] = from_fp16(to_fp16(levels[k] * scale));
}

/* out[i] = table[code[i]] for the 2n codes of n bytes; the vector code takes 16 bytes (32 codes) at a time. */
static inline void look_up_16(uint16_t *out, const uint8_t *bytes, int64_t n, const uint16_t *table) {
    int64_t i = 0;
#if defined(__AVX512BW__)
    __m512i both = _mm512_loadu_si512(table);
    for (; i + 16 <= n; i += 16) {
        __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(bytes + i)));
        /* vpermw reads five bits of each index; the table is stored twice, so the fifth bit does not matter */
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
#elif defined(__aarch64__)
    uint8x16x2_t all = vld2q_u8((const uint8_t *)table); /* the low bytes of the 16 values, and their high bytes */
    for (; i + 16 <= n; i += 16) {
        uint8x16x2_t code = codes_of_16(bytes + i), value;
        for (int k = 0; k < 2; k++) {
            for (int b = 0; b < 2; b++) value.val[b] = vqtbl1q_u8(all.val[b], code.val[k]);
            vst2q_u8((uint8_t *)(out + 2 * i + 16 * k), value);
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
        /* vpermps reads only four bits of each index, so the high half of a byte needs no mask */
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
#elif defined(__aarch64__)
    uint8x16x4_t all = vld4q_u8((const uint8_t *)table);
    for (; i + 16 <= n; i += 16) {
        uint8x16x2_t code = codes_of_16(bytes + i);
        for (int k = 0; k < 2; k++) {
            uint8x16x4_t value;
            for (int b = 0; b < 4; b++) value.val[b] = vqtbl1q_u8(all.val[b], code.val[k]);
            vst4q_u8((uint8_t *)(out + 2 * i + 16 * k), value);
        }
    }
#endif
    for (; i < n; i++) out[2 * i] = table[bytes[i] >> 4], out[2 * i + 1] = table[bytes[i] & 15];
}

/* Decodes the weights [begin, end) of the flat weight to out[0 .. end - begin); `begin` may be the middle of a byte.
   T is the type of the output. */
#define DEFINE_DECODE(NAME, T, TABLE, LOOK_UP)                                                            \
    static inline void NAME(const Weight *w, int64_t begin, int64_t end, T *out) {                        \
        for (int64_t i = begin; i < end;) {                                                               \
            int64_t block = i >> w->block_shift, stop = min64(end, (block + 1) << w->block_shift);        \
            T table[32] __attribute__((aligned(64)));                                                     \
            TABLE(table, w->levels, scale_of_block(w, block));                                            \
            if (i & 1) *out++ = table[w->packed[i++ >> 1] & 15];                                          \
            LOOK_UP(out, w->packed + (i >> 1), (stop - i) >> 1, table);                                   \
            if (i < stop && ((stop - i) & 1)) out[stop - i - 1] = table[w->packed[(stop - 1) >> 1] >> 4]; \
            out += stop - i;                                                                              \
            i = stop;                                                                                     \
        }                                                                                                 \
    }

DEFINE_DECODE(decode_fp32, float, table_fp32, look_up_32)
DEFINE_DECODE(decode_bf16, uint16_t, table_bf16, look_up_16)
DEFINE_DECODE(decode_fp16, uint16_t, table_fp16, look_up_16)
DEFINE_DECODE(decode_bf16_in_fp32, float, table_bf16_in_fp32, look_up_32)
DEFINE_DECODE(decode_fp16_in_fp32, float, table_fp16_in_fp32, look_up_32)
