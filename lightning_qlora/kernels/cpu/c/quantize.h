/* Quantization. quantization/blockwise.py explains the steps and their rounding. */
enum { MOST = 4096 }; /* the largest block */

static void quantize_block(const void *x, int type, int64_t begin, int64_t n, int whole, const float *bounds,
                           const uint8_t *order, uint8_t *packed, float *absmax) {
    float value[MOST + 1];
    int32_t code[MOST + 1], most = 0;
    if (type == FP32) memcpy(value, (const float *)x + begin, 4 * n);
    else if (type == BF16) for (int64_t i = 0; i < n; i++) value[i] = from_bf16(((const uint16_t *)x)[begin + i]);
    else for (int64_t i = 0; i < n; i++) value[i] = from_fp16(((const uint16_t *)x)[begin + i]);
    for (int64_t i = 0; i < n; i++) { /* fp32 magnitudes have the same order as their bits */
        int32_t magnitude = to_bits(value[i]) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    float scale = from_bits(most), at_least = scale > 1e-38f ? scale : 1e-38f, inverse = 1.0f / at_least;
    *absmax = whole ? scale : at_least; /* blockwise.py: multiply a whole block, divide a short last one */
    for (int64_t i = 0; i < n; i++) value[i] = whole ? value[i] * inverse : value[i] / at_least;
    value[n] = 0; /* pads the last byte if the number of weights is odd */
    int64_t bytes = (n + 1) / 2;
    memset(code, 0, sizeof(int32_t) * 2 * bytes);
    for (int k = 0; k < 15; k++)
        for (int64_t i = 0; i < 2 * bytes; i++) code[i] += value[i] > bounds[k];
    for (int64_t i = 0; i < bytes; i++) packed[i] = order[code[2 * i]] << 4 | order[code[2 * i + 1]];
}

/* The flat x [n] in blocks of 2^shift -> codes, packed [ceil(n / 2)], and scales, absmax [ceil(n / 2^shift)]. */
void quantize(const void *x, int type, int64_t n, int64_t shift, const float *bounds, const uint8_t *order,
              uint8_t *packed, float *absmax, int threads) {
    int64_t size = (int64_t)1 << shift, blocks = (n + size - 1) >> shift;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && n > 2 * PIECE)
    for (int64_t b = 0; b < blocks; b++) {
        int64_t begin = b << shift, here = min64(size, n - begin);
        quantize_block(x, type, begin, here, here == size, bounds, order, packed + begin / 2, absmax + b);
    }
}

/* Scales [n] -> 8-bit codes [n] and nested scales [ceil(n / 256)]; code_of_grid [65536] is blockwise.py, code_of_place. */
void quantize_scales(const float *absmax, int64_t n, float offset, const uint8_t *code_of_grid, uint8_t *codes,
                     float *nested) {
    for (int64_t begin = 0; begin < n; begin += 256) {
        int64_t here = min64(256, n - begin);
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
            /* NaN (from inf * 0) becomes the lowest grid point */
            codes[begin + i] = most == 0 ? 0 : code_of_grid[place > 0 ? (int32_t)place : 0];
        }
    }
}
