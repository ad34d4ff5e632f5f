/* Calls the functions of kernels.c with the arguments of a file, for machines that are emulated without Python:
   driver INPUT OUTPUT. test_emulated.py writes the input and reads the output: every array that a function wrote. */
#include "kernels.c"
#include <stdio.h>
#include <stdlib.h>

static FILE *input, *output;

static int64_t number(void) {
    int64_t n;
    if (fread(&n, 8, 1, input) != 1) exit(3);
    return n;
}

static float real(void) { return from_bits((uint32_t)number()); }

static void *array(void) { /* its size in bytes, then the bytes; NULL if there are none */
    int64_t bytes = number();
    if (!bytes) return NULL;
    void *data = malloc(bytes);
    if (fread(data, 1, bytes, input) != (size_t)bytes) exit(3);
    return data;
}

static void *result(int64_t bytes) { return calloc(bytes, 1); }
static void save(const void *data, int64_t bytes) { fwrite(data, 1, bytes, output); }

static int64_t size_of_type(int type) { return type == FP32 ? 4 : 2; }

static Weight weight(void) {
    Weight w = {.packed = array(), .absmax = array(), .nested = array(), .levels = array(), .dynamic = array()};
    w.offset = array();
    w.rows = number(), w.columns = number(), w.block_shift = number();
    return w;
}

int main(int count, char **names) {
    if (count != 3 || !(input = fopen(names[1], "rb")) || !(output = fopen(names[2], "wb"))) return 2;
    printf("%s\n", form());
    for (int64_t function; (function = number());) {
        int threads = number();
        if (function == 1) {
            Weight w = weight();
            int type = number();
            int64_t bytes = w.rows * w.columns * size_of_type(type);
            void *out = result(bytes);
            dequantize(&w, out, type, threads);
            save(out, bytes);
        } else if (function == 2) {
            int type = number();
            int64_t n = number(), shift = number(), blocks = (n + ((int64_t)1 << shift) - 1) >> shift;
            void *x = array(), *bounds = array(), *order = array(), *packed = result((n + 1) / 2);
            float *absmax = result(4 * blocks);
            quantize(x, type, n, shift, bounds, order, packed, absmax, threads);
            save(packed, (n + 1) / 2), save(absmax, 4 * blocks);
        } else if (function == 3) {
            int64_t n = number();
            float offset = real();
            void *absmax = array(), *places = array(), *codes = result(n), *nested = result((n + 255) / 256 * 4);
            quantize_scales(absmax, n, offset, places, codes, nested);
            save(codes, n), save(nested, (n + 255) / 256 * 4);
        } else if (function == 4) {
            int type = number();
            int64_t n = number(), seed = number(), least = number();
            float scale = real();
            void *x = array(), *out = result(n * size_of_type(type));
            dropout(x, out, type, n, seed, least, scale, threads);
            save(out, n * size_of_type(type));
#if defined(__AVX2__) || defined(__aarch64__)
        } else if (function == 5) {
            Weight w = weight();
            int type = number();
            int64_t rows = number(), r = number(), bytes = rows * w.rows * size_of_type(type);
            float scaling = real();
            void *x = array(), *bias = array(), *a = array(), *b = array(), *y = result(bytes);
            float *workspace = result(8 * (rows + 3) * (w.columns + r + 16));
            lora_linear(&w, x, y, type, rows, bias, FP32, NULL, a, b, r, scaling, workspace, threads);
            save(y, bytes);
#endif
        }
    }
    return fclose(output);
}
