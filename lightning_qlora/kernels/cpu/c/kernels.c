/* The CPU kernels. build.py compiles this file when it is first needed, library.py calls it. */
#include "dequantize.h"

enum { PIECE = 1 << 14 }; /* weights per task of a thread; a multiple of every block size */

#include "lora_linear.h"
#include "quantize.h"
#include "dropout.h"

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
#elif defined(__aarch64__)
    return "NEON";
#else
    return "plain C";
#endif
}

void dequantize(const Weight *w, void *out, int type, int threads) {
    int64_t n = w->rows * w->columns, pieces = (n + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && pieces > 2)
    for (int64_t p = 0; p < pieces; p++) {
        int64_t begin = p * PIECE, end = min64(n, begin + PIECE);
        if (type == FP32) decode_fp32(w, begin, end, (float *)out + begin);
        else if (type == BF16) decode_bf16(w, begin, end, (uint16_t *)out + begin);
        else decode_fp16(w, begin, end, (uint16_t *)out + begin);
    }
}
