/* Dropout. The mask is a hash of the seed and of the index of the element. */
static inline uint32_t mix(uint32_t h) { /* reference.py, _mix */
    h = (h ^ (h >> 16)) * 0x7feb352dU;
    h = (h ^ (h >> 15)) * 0x846ca68bU;
    return h ^ (h >> 16);
}

/* out[i] = x[i] * scale if the hash of the element's index and seed is at least `least_kept`, else 0. `out` may be x. */
void dropout(const void *x, void *out, int type, int64_t n, int64_t seed, int32_t least_kept, float scale,
             int threads) {
    uint32_t low = (uint32_t)seed, high = (uint32_t)(seed >> 32);
    int64_t pieces = (n + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && pieces > 2)
    for (int64_t p = 0; p < pieces; p++) {
        int64_t begin = p * PIECE, end = min64(n, begin + PIECE);
#define EACH(TYPE)                                                            \
    for (int64_t i = begin; i < end; i++) {                                   \
        int keep = (int32_t)mix(mix((uint32_t)i + low) ^ high) >= least_kept; \
        store(out, i, TYPE, keep ? load(x, i, TYPE) * scale : 0.0f);          \
    }
        if (type == FP32) EACH(FP32)
        else if (type == BF16) EACH(BF16)
        else EACH(FP16)
#undef EACH
    }
}
