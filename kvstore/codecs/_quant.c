/* Codes bfloat16 keys and values in 8, 6 or 4 bits, and back, without the GIL. twin.py does the same, to the byte.
 *
 *   make_plan(tensors, page_bytes, bits, key_group, value_group, digest) -> plan
 *   coded_bytes(plan, skip) -> bytes of a page's encoding
 *   encode(plan, page, out, skip, portable) -> largest squared relative error of a tensor; not finite: not to be coded
 *   decode(plan, blob, out, portable) -> None
 *
 * tensors: int64, shape (n, 7): is_key, offset, heads, head_stride, tokens, token_stride, dims; strides are bytes, and
 *          element (head, token, dim) of a tensor lies at offset + head * head_stride + token * token_stride + 2 * dim.
 *          Together they cover the page, no byte twice: a plan that does not is refused, so what comes later need not ask.
 * skip:    leading tokens that stay as they are, 0 or 1.
 * portable: 1 for the path without AVX2, else what this processor has.
 *
 * Keys have a scale for each channel over key_group tokens, values one for each token over value_group channels
 * (docs/formats.md). A scale is what the group itself holds: its largest magnitude, or its least and largest value, as the
 * bfloat16 that they are. They come back as themselves, so a page that was decoded is encoded to the same bytes again.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_AVX2 1
#endif

#define MAX_DIMS 1024
#define MOST_BYTES (1LL << 30) /* of a page; no group has more tokens or channels */
#define HEAD_BYTES 8
#define TINY 0x1p-100f    /* a group of smaller values is a group of one value: 1 / TINY is still a number */
#define LEAST_ENERGY 1e-20 /* sums of squares between which those of a tensor and of its errors are exact enough */
#define MOST_ENERGY 1e30
#define ROUND 12582912.0f /* 1.5 * 2^23: adding it rounds to the nearest whole number, ties to even */

typedef struct {
    int64_t is_key, offset, heads, head_stride, tokens, token_stride, dims;
} Tensor;

typedef struct {
    int64_t num_tensors, page_bytes, key_group, value_group;
    int bits;
    uint32_t digest;
    Tensor tensors[];
} Plan;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE float wide(uint16_t bits)
{
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

INLINE uint16_t narrow(float value) /* finite; ties to even */
{
    uint32_t word;
    memcpy(&word, &value, 4);
    word += 0x7fff + ((word >> 16) & 1);
    return (uint16_t)(word >> 16);
}

/* The order of bfloat16 as that of whole numbers; its own inverse. */
INLINE int16_t ordered(uint16_t bits) { return (int16_t)(bits ^ ((uint16_t)((int16_t)bits >> 15) & 0x7fff)); }

/* ---- one group's scale: what is stored of it (low, high; magnitude in `high` for 8 bits), and the numbers to code with */

typedef struct {
    float low, step, inverse;
    uint16_t high;
} Scale;

INLINE Scale scale_of(int bits, uint16_t *low, uint16_t *high)
{
    Scale scale = {0, 0, 0, 0};
    float levels = bits == 8 ? 127.0f : (float)((1 << bits) - 1);
    if (*low == 0x8000)
        *low = 0; /* there is one zero, or a group would not come back as itself */
    if (*high == 0x8000)
        *high = 0;
    scale.low = bits == 8 ? 0 : wide(*low);
    float range = wide(*high) - scale.low;
    if (range <= TINY)
        *high = bits == 8 ? 0 : *low;
    scale.high = *high;
    if (range <= TINY)
        return scale;
    scale.step = range / levels;
    scale.inverse = levels / range;
    return scale;
}

/* ---- rows of `n` elements; a scale for each element, or one for all */

INLINE void code_row(const uint16_t *restrict x, uint8_t *restrict codes, const float *restrict low,
                     const float *restrict step, const float *restrict inverse, float *restrict error,
                     float *restrict energy, int64_t n, int each)
{
    for (int64_t i = 0; i < n; i++) {
        float value = wide(x[i]), from = low[each ? i : 0];
        float rounded = (value - from) * inverse[each ? i : 0] + ROUND;
        uint32_t word;
        memcpy(&word, &rounded, 4);
        codes[i] = (uint8_t)word;
        float difference = value - (from + (rounded - ROUND) * step[each ? i : 0]);
        error[i] += difference * difference;
        energy[i] += value * value;
    }
}

INLINE void value_row(const uint8_t *restrict codes, uint16_t *restrict x, const float *restrict low,
                      const float *restrict step, const uint16_t *restrict high, int64_t n, int each, int bits)
{
    const int last = (1 << bits) - 1;
    for (int64_t i = 0; i < n; i++) {
        if (bits == 8) {
            x[i] = narrow((float)(int8_t)codes[i] * step[each ? i : 0]);
        } else {
            uint16_t inside = narrow(low[each ? i : 0] + (float)codes[i] * step[each ? i : 0]);
            uint16_t is_last = (uint16_t) - (codes[i] == last); /* a mask: a branch would keep the loop from vectors */
            x[i] = (uint16_t)((inside & ~is_last) | (high[each ? i : 0] & is_last));
        }
    }
}

/* The same with a number of elements that the compiler knows, where it is a usual one. */
INLINE void value_group(const uint8_t *codes, uint16_t *x, const Scale *scale, int64_t n, int bits)
{
    if (n == 32)
        value_row(codes, x, &scale->low, &scale->step, &scale->high, 32, 0, bits);
    else if (n == 64)
        value_row(codes, x, &scale->low, &scale->step, &scale->high, 64, 0, bits);
    else
        value_row(codes, x, &scale->low, &scale->step, &scale->high, n, 0, bits);
}

INLINE void code_group(const uint16_t *x, uint8_t *codes, const Scale *scale, float *error, float *energy, int64_t n)
{
    if (n == 32)
        code_row(x, codes, &scale->low, &scale->step, &scale->inverse, error, energy, 32, 0);
    else if (n == 64)
        code_row(x, codes, &scale->low, &scale->step, &scale->inverse, error, energy, 64, 0);
    else
        code_row(x, codes, &scale->low, &scale->step, &scale->inverse, error, energy, n, 0);
}

/* Codes of a row, packed: the row is cut into 2 or 4 parts, and a byte holds what lies at one place of them. Runs of 16 have a
 * length that the compiler knows: a part is seldom longer than a vector of bytes. */
INLINE void pack_run(const uint8_t *restrict codes, uint8_t *restrict to, int64_t part, int64_t n, int bits)
{
    for (int64_t i = 0; i < n; i++) {
        if (bits == 4) {
            to[i] = (uint8_t)(codes[i] | codes[i + part] << 4);
        } else {
            uint8_t last = codes[i + 3 * part];
            to[i] = (uint8_t)(codes[i] | last << 6);
            to[i + part] = (uint8_t)(codes[i + part] | (last >> 2) << 6);
            to[i + 2 * part] = (uint8_t)(codes[i + 2 * part] | (last >> 4) << 6);
        }
    }
}

INLINE void unpack_run(const uint8_t *restrict from, uint8_t *restrict codes, int64_t part, int64_t n, int bits)
{
    for (int64_t i = 0; i < n; i++) {
        if (bits == 4) {
            codes[i] = from[i] & 15;
            codes[i + part] = from[i] >> 4;
        } else {
            uint8_t a = from[i], b = from[i + part], c = from[i + 2 * part];
            codes[i] = a & 63;
            codes[i + part] = b & 63;
            codes[i + 2 * part] = c & 63;
            codes[i + 3 * part] = (uint8_t)(a >> 6 | (b >> 6) << 2 | (c >> 6) << 4);
        }
    }
}

INLINE void pack(const uint8_t *restrict codes, uint8_t *restrict to, int64_t dims, int bits)
{
    int64_t part = bits == 4 ? dims / 2 : dims / 4, i = 0;
    if (bits == 8) {
        memcpy(to, codes, (size_t)dims);
        return;
    }
    for (; i + 16 <= part; i += 16)
        pack_run(codes + i, to + i, part, 16, bits);
    pack_run(codes + i, to + i, part, part - i, bits);
}

INLINE void unpack(const uint8_t *restrict from, uint8_t *restrict codes, int64_t dims, int bits)
{
    int64_t part = bits == 4 ? dims / 2 : dims / 4, i = 0;
    for (; i + 16 <= part; i += 16)
        unpack_run(from + i, codes + i, part, 16, bits);
    unpack_run(from + i, codes + i, part, part - i, bits);
}

/* ---- whole pages */

INLINE const uint16_t *row_at(const Tensor *t, const uint8_t *page, int64_t head, int64_t token)
{
    return (const uint16_t *)(const void *)(page + t->offset + head * t->head_stride + token * t->token_stride);
}

/* Numbers stored of one head: one or two of each group. */
INLINE int64_t scales_of(const Plan *plan, const Tensor *t, int64_t skip)
{
    int64_t tokens = t->tokens - skip, each = plan->bits == 8 ? 1 : 2;
    if (t->is_key)
        return each * t->dims * ((tokens + plan->key_group - 1) / plan->key_group);
    return each * tokens * ((t->dims + plan->value_group - 1) / plan->value_group);
}

static int64_t coded_bytes_of(const Plan *plan, int64_t skip)
{
    int64_t total = HEAD_BYTES;
    for (int64_t i = 0; i < plan->num_tensors; i++) {
        const Tensor *t = &plan->tensors[i];
        total += t->heads * (skip * t->dims * 2 + scales_of(plan, t, skip) * 2 +
                             (t->tokens - skip) * t->dims * plan->bits / 8);
    }
    return total;
}

/* Where the three parts of an encoding lie: rows that stay, scales, codes. */
typedef struct {
    uint16_t *rows, *scales;
    uint8_t *codes;
} Parts;

static Parts parts_of(const Plan *plan, uint8_t *blob, int64_t skip)
{
    int64_t rows = 0, scales = 0;
    for (int64_t i = 0; i < plan->num_tensors; i++) {
        const Tensor *t = &plan->tensors[i];
        rows += t->heads * skip * t->dims;
        scales += t->heads * scales_of(plan, t, skip);
    }
    uint16_t *first = (uint16_t *)(void *)(blob + HEAD_BYTES);
    Parts parts = {first, first + rows, (uint8_t *)(first + rows + scales)};
    return parts;
}

typedef struct {
    float low[MAX_DIMS], step[MAX_DIMS], inverse[MAX_DIMS], error[MAX_DIMS], energy[MAX_DIMS];
    int16_t least[MAX_DIMS], most[MAX_DIMS];
    uint16_t high[MAX_DIMS];
    uint8_t codes[MAX_DIMS];
} Work;

INLINE void encode_keys(const Plan *plan, const Tensor *t, const uint8_t *page, int64_t head, int64_t skip, int bits,
                        Parts *parts, Work *work)
{
    int64_t dims = t->dims, each = bits == 8 ? 1 : 2;
    for (int64_t first = skip; first < t->tokens; first += plan->key_group) {
        int64_t end = least(first + plan->key_group, t->tokens);
        int16_t *restrict low = work->least, *restrict high = work->most;
        for (int64_t i = 0; i < dims; i++)
            low[i] = INT16_MAX, high[i] = bits == 8 ? 0 : INT16_MIN;
        for (int64_t token = first; token < end; token++) {
            const uint16_t *restrict x = row_at(t, page, head, token);
            if (bits == 8) {
                for (int64_t i = 0; i < dims; i++) {
                    int16_t magnitude = (int16_t)(x[i] & 0x7fff);
                    high[i] = magnitude > high[i] ? magnitude : high[i];
                }
            } else {
                for (int64_t i = 0; i < dims; i++) {
                    int16_t place = ordered(x[i]);
                    low[i] = place < low[i] ? place : low[i];
                    high[i] = place > high[i] ? place : high[i];
                }
            }
        }
        for (int64_t i = 0; i < dims; i++) {
            uint16_t from = (uint16_t)ordered((uint16_t)low[i]);
            uint16_t to = bits == 8 ? (uint16_t)high[i] : (uint16_t)ordered((uint16_t)high[i]);
            Scale scale = scale_of(bits, &from, &to);
            work->low[i] = scale.low, work->step[i] = scale.step, work->inverse[i] = scale.inverse;
            if (bits != 8)
                parts->scales[i] = from;
            parts->scales[(each - 1) * dims + i] = to;
        }
        parts->scales += each * dims;
        for (int64_t token = first; token < end; token++) {
            code_row(row_at(t, page, head, token), work->codes, work->low, work->step, work->inverse, work->error,
                     work->energy, dims, 1);
            pack(work->codes, parts->codes, dims, bits);
            parts->codes += dims * bits / 8;
        }
    }
}

INLINE void encode_values(const Plan *plan, const Tensor *t, const uint8_t *page, int64_t head, int64_t skip, int bits,
                          Parts *parts, Work *work)
{
    int64_t dims = t->dims, num_groups = (dims + plan->value_group - 1) / plan->value_group, each = bits == 8 ? 1 : 2;
    for (int64_t token = skip; token < t->tokens; token++) {
        const uint16_t *restrict x = row_at(t, page, head, token);
        for (int64_t group = 0; group < num_groups; group++) {
            int64_t first = group * plan->value_group, end = least(first + plan->value_group, dims);
            uint16_t from = 0, to = 0;
            if (bits == 8) {
                int16_t high = 0;
                for (int64_t i = first; i < end; i++) {
                    int16_t magnitude = (int16_t)(x[i] & 0x7fff);
                    high = magnitude > high ? magnitude : high;
                }
                to = (uint16_t)high;
            } else {
                int16_t low = INT16_MAX, high = INT16_MIN;
                for (int64_t i = first; i < end; i++) {
                    int16_t place = ordered(x[i]);
                    low = place < low ? place : low;
                    high = place > high ? place : high;
                }
                from = (uint16_t)ordered((uint16_t)low), to = (uint16_t)ordered((uint16_t)high);
            }
            Scale scale = scale_of(bits, &from, &to);
            if (bits != 8)
                parts->scales[group] = from;
            parts->scales[(each - 1) * num_groups + group] = to;
            code_group(x + first, work->codes + first, &scale, work->error + first, work->energy + first, end - first);
        }
        parts->scales += each * num_groups;
        pack(work->codes, parts->codes, dims, bits);
        parts->codes += dims * bits / 8;
    }
}

static int is_zero(const Tensor *t, const uint8_t *page, int64_t skip)
{
    for (int64_t head = 0; head < t->heads; head++)
        for (int64_t token = skip; token < t->tokens; token++)
            for (int64_t i = 0; i < t->dims; i++)
                if (row_at(t, page, head, token)[i] & 0x7fff)
                    return 0;
    return 1;
}

INLINE double encode_with(const Plan *plan, const uint8_t *page, uint8_t *out, int64_t skip, int bits)
{
    uint8_t head[HEAD_BYTES] = {0};
    memcpy(head, &plan->digest, 4);
    head[4] = (uint8_t)skip;
    memcpy(out, head, HEAD_BYTES);
    Parts parts = parts_of(plan, out, skip);
    Work work;
    double worst = 0;
    for (int64_t index = 0; index < plan->num_tensors; index++) {
        const Tensor *t = &plan->tensors[index];
        memset(work.error, 0, sizeof work.error);
        memset(work.energy, 0, sizeof work.energy);
        for (int64_t i = 0; i < t->heads; i++) {
            if (skip) {
                memcpy(parts.rows, row_at(t, page, i, 0), (size_t)t->dims * 2);
                parts.rows += t->dims;
            }
            if (t->is_key)
                encode_keys(plan, t, page, i, skip, bits, &parts, &work);
            else
                encode_values(plan, t, page, i, skip, bits, &parts, &work);
        }
        double error = 0, energy = 0;
        for (int64_t i = 0; i < t->dims; i++)
            error += work.error[i], energy += work.energy[i];
        /* Not within bounds either if it is not a number. The squares of a tensor of zeros are no measure of anything. */
        int is_measured = energy >= LEAST_ENERGY && energy <= MOST_ENERGY;
        double relative = is_measured ? error / energy : is_zero(t, page, skip) ? 0 : HUGE_VAL;
        worst = relative > worst ? relative : worst;
    }
    return worst;
}

INLINE void decode_with(const Plan *plan, uint8_t *blob, uint8_t *out, int64_t skip, int bits)
{
    Parts parts = parts_of(plan, blob, skip);
    Work work;
    for (int64_t index = 0; index < plan->num_tensors; index++) {
        const Tensor *t = &plan->tensors[index];
        int64_t dims = t->dims, num_groups = (dims + plan->value_group - 1) / plan->value_group;
        int64_t each = bits == 8 ? 1 : 2;
        for (int64_t i = 0; i < t->heads; i++) {
            if (skip) {
                memcpy((uint16_t *)row_at(t, out, i, 0), parts.rows, (size_t)dims * 2);
                parts.rows += dims;
            }
            for (int64_t token = skip; token < t->tokens; token++) {
                uint16_t *x = (uint16_t *)row_at(t, out, i, token);
                if (bits != 8)
                    unpack(parts.codes, work.codes, dims, bits);
                const uint8_t *codes = bits == 8 ? parts.codes : work.codes;
                parts.codes += dims * bits / 8;
                if (t->is_key) {
                    if ((token - skip) % plan->key_group == 0) {
                        for (int64_t d = 0; d < dims; d++) {
                            uint16_t from = bits == 8 ? 0 : parts.scales[d], to = parts.scales[(each - 1) * dims + d];
                            Scale scale = scale_of(bits, &from, &to);
                            work.low[d] = scale.low, work.step[d] = scale.step, work.high[d] = scale.high;
                        }
                        parts.scales += each * dims;
                    }
                    value_row(codes, x, work.low, work.step, work.high, dims, 1, bits);
                    continue;
                }
                for (int64_t group = 0; group < num_groups; group++) {
                    int64_t first = group * plan->value_group, end = least(first + plan->value_group, dims);
                    uint16_t from = bits == 8 ? 0 : parts.scales[group];
                    uint16_t to = parts.scales[(each - 1) * num_groups + group];
                    Scale scale = scale_of(bits, &from, &to);
                    value_group(codes + first, x + first, &scale, end - first, bits);
                }
                parts.scales += each * num_groups;
            }
        }
    }
}

/* The number of bits is a constant in each of these: the loops have no question in them. */
INLINE double encode_any(const Plan *plan, const uint8_t *page, uint8_t *out, int64_t skip)
{
    return plan->bits == 8   ? encode_with(plan, page, out, skip, 8)
           : plan->bits == 6 ? encode_with(plan, page, out, skip, 6)
                             : encode_with(plan, page, out, skip, 4);
}

INLINE void decode_any(const Plan *plan, uint8_t *blob, uint8_t *out, int64_t skip)
{
    if (plan->bits == 8)
        decode_with(plan, blob, out, skip, 8);
    else if (plan->bits == 6)
        decode_with(plan, blob, out, skip, 6);
    else
        decode_with(plan, blob, out, skip, 4);
}

static double encode_portable(const Plan *plan, const uint8_t *page, uint8_t *out, int64_t skip)
{
    return encode_any(plan, page, out, skip);
}

static void decode_portable(const Plan *plan, uint8_t *blob, uint8_t *out, int64_t skip)
{
    decode_any(plan, blob, out, skip);
}

#ifdef HAVE_AVX2
__attribute__((target("avx2"))) static double encode_avx2(const Plan *plan, const uint8_t *page, uint8_t *out,
                                                          int64_t skip)
{
    return encode_any(plan, page, out, skip);
}

__attribute__((target("avx2"))) static void decode_avx2(const Plan *plan, uint8_t *blob, uint8_t *out, int64_t skip)
{
    decode_any(plan, blob, out, skip);
}

static int has_avx2(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") != 0;
}
#else
#define encode_avx2 encode_portable
#define decode_avx2 decode_portable
static int has_avx2(void) { return 0; }
#endif

/* ---- the border */

static const char PLAN[] = "kvstore.codecs._quant.plan";

static void free_plan(PyObject *capsule) { free(PyCapsule_GetPointer(capsule, PLAN)); }

/* Mark the elements of a tensor; 0 with an error set if one lies outside of the page or was marked before. */
static int mark(const Tensor *t, Py_ssize_t index, int64_t page_bytes, uint8_t *marks)
{
    if ((t->is_key != 0 && t->is_key != 1) || t->heads < 1 || t->tokens < 1 || t->dims < 8 || t->dims > MAX_DIMS ||
        t->dims % 8 || t->offset < 0 || t->offset % 2 || t->head_stride < 0 || t->head_stride % 2 ||
        t->token_stride < 0 || t->token_stride % 2 || t->offset > page_bytes || t->heads > page_bytes ||
        t->tokens > page_bytes || t->head_stride > page_bytes || t->token_stride > page_bytes ||
        /* of numbers up to MOST_BYTES: nothing here overflows */
        t->offset + (t->heads - 1) * t->head_stride + (t->tokens - 1) * t->token_stride + t->dims * 2 > page_bytes) {
        PyErr_Format(PyExc_ValueError, "tensor %zd does not fit a page of %lld bytes, or its dims are no multiple of 8 "
                     "up to %d", index, (long long)page_bytes, MAX_DIMS);
        return 0;
    }
    for (int64_t head = 0; head < t->heads; head++)
        for (int64_t token = 0; token < t->tokens; token++) {
            uint8_t *at = marks + (t->offset + head * t->head_stride + token * t->token_stride) / 2;
            if (memchr(at, 1, (size_t)t->dims)) {
                PyErr_Format(PyExc_ValueError, "tensor %zd overlaps another, or itself", index);
                return 0;
            }
            memset(at, 1, (size_t)t->dims);
        }
    return 1;
}

static PyObject *make_plan(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *table;
    long long page_bytes, key_group, value_group;
    int bits;
    unsigned int digest;
    if (!PyArg_ParseTuple(args, "OLiLLI", &table, &page_bytes, &bits, &key_group, &value_group, &digest))
        return NULL;
    if (page_bytes < 2 || page_bytes > MOST_BYTES || page_bytes % 2 || (bits != 8 && bits != 6 && bits != 4) ||
        key_group < 1 || key_group > MOST_BYTES || value_group < 8 || value_group > MOST_BYTES || value_group % 8)
        return PyErr_Format(PyExc_ValueError, "page of %lld bytes, %d bits, groups of %lld and %lld: not to be coded",
                            page_bytes, bits, key_group, value_group);
    Py_buffer view;
    if (PyObject_GetBuffer(table, &view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0)
        return NULL;
    const char *format = view.format ? view.format : "B";
    PyObject *capsule = NULL;
    Plan *plan = NULL;
    uint8_t *marks = NULL;
    if (view.ndim != 2 || view.itemsize != 8 || (strcmp(format, "l") && strcmp(format, "q")) || view.shape[0] < 1 ||
        view.shape[1] != 7) {
        PyErr_Format(PyExc_ValueError, "tensors: int64 of shape (n, 7) is needed, not %d dimensions of format %s",
                     view.ndim, format);
        goto out;
    }
    plan = calloc(1, sizeof *plan + (size_t)view.len);
    marks = calloc((size_t)page_bytes / 2, 1);
    if (plan == NULL || marks == NULL) {
        PyErr_NoMemory();
        goto out;
    }
    plan->num_tensors = view.shape[0], plan->page_bytes = page_bytes, plan->bits = bits, plan->digest = digest;
    plan->key_group = key_group, plan->value_group = value_group;
    memcpy(plan->tensors, view.buf, (size_t)view.len);
    for (Py_ssize_t i = 0; i < view.shape[0]; i++)
        if (!mark(&plan->tensors[i], i, page_bytes, marks))
            goto out;
    if (memchr(marks, 0, (size_t)page_bytes / 2)) {
        PyErr_Format(PyExc_ValueError, "the tensors do not cover a page of %lld bytes", page_bytes);
        goto out;
    }
    if ((capsule = PyCapsule_New(plan, PLAN, free_plan)) != NULL)
        plan = NULL;
out:
    free(marks);
    free(plan);
    PyBuffer_Release(&view);
    return capsule;
}

static PyObject *coded_bytes(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *capsule;
    int skip;
    if (!PyArg_ParseTuple(args, "Oi", &capsule, &skip))
        return NULL;
    const Plan *plan = PyCapsule_GetPointer(capsule, PLAN);
    if (plan == NULL)
        return NULL;
    if (skip != 0 && skip != 1)
        return PyErr_Format(PyExc_ValueError, "skip is %d; it must be 0 or 1", skip);
    return PyLong_FromLongLong(coded_bytes_of(plan, skip));
}

/* Two buffers, the second to be written: refused unless they are flat, at even addresses and apart. */
static int get_buffers(PyObject *from, PyObject *to, Py_buffer *source, Py_buffer *target)
{
    if (PyObject_GetBuffer(from, source, PyBUF_SIMPLE) < 0)
        return 0;
    if (PyObject_GetBuffer(to, target, PyBUF_WRITABLE) < 0) {
        PyBuffer_Release(source);
        return 0;
    }
    uintptr_t a = (uintptr_t)source->buf, b = (uintptr_t)target->buf;
    const char *wrong = (a | b) & 1 ? "at an odd address"
                        : a < b + (uintptr_t)target->len && b < a + (uintptr_t)source->len ? "of overlapping memory"
                                                                                          : NULL;
    if (wrong == NULL)
        return 1;
    PyErr_Format(PyExc_ValueError, "a page and its encoding cannot be %s", wrong);
    PyBuffer_Release(source);
    PyBuffer_Release(target);
    return 0;
}

static PyObject *encode(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *capsule, *page, *out;
    int skip, portable;
    if (!PyArg_ParseTuple(args, "OOOii", &capsule, &page, &out, &skip, &portable))
        return NULL;
    const Plan *plan = PyCapsule_GetPointer(capsule, PLAN);
    Py_buffer source, target;
    if (plan == NULL || !get_buffers(page, out, &source, &target))
        return NULL;
    PyObject *result = NULL;
    if (skip != 0 && skip != 1) {
        PyErr_Format(PyExc_ValueError, "skip is %d; it must be 0 or 1", skip);
    } else if (source.len != plan->page_bytes || target.len < coded_bytes_of(plan, skip)) {
        PyErr_Format(PyExc_ValueError, "a page has %lld bytes and its encoding %lld, not %zd and %zd",
                     (long long)plan->page_bytes, (long long)coded_bytes_of(plan, skip), source.len, target.len);
    } else {
        double worst;
        Py_BEGIN_ALLOW_THREADS
        worst = (portable || !has_avx2() ? encode_portable : encode_avx2)(plan, source.buf, target.buf, skip);
        Py_END_ALLOW_THREADS
        result = PyFloat_FromDouble(worst);
    }
    PyBuffer_Release(&source);
    PyBuffer_Release(&target);
    return result;
}

/* 0 if a scale is no number, or no group can have it. */
static int scales_are_sound(const Plan *plan, uint8_t *blob, int64_t skip)
{
    Parts parts = parts_of(plan, blob, skip);
    for (int64_t index = 0; index < plan->num_tensors; index++) {
        const Tensor *t = &plan->tensors[index];
        int64_t num_scales = scales_of(plan, t, skip);
        int64_t groups = plan->bits == 8 ? num_scales
                         : t->is_key     ? t->dims
                                         : (t->dims + plan->value_group - 1) / plan->value_group;
        for (int64_t head = 0; head < t->heads; head++, parts.scales += num_scales)
            for (int64_t i = 0; i < num_scales; i++) {
                uint16_t bits = parts.scales[i];
                if ((bits & 0x7f80) == 0x7f80 || (plan->bits == 8 && bits & 0x8000))
                    return 0;
                if (plan->bits != 8 && i / groups % 2 == 0 && i + groups < num_scales) {
                    float range = wide(parts.scales[i + groups]) - wide(bits);
                    if (!(range >= 0 && isfinite(range)))
                        return 0;
                }
            }
    }
    return 1;
}

static PyObject *decode(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *capsule, *blob, *out;
    int portable;
    if (!PyArg_ParseTuple(args, "OOOi", &capsule, &blob, &out, &portable))
        return NULL;
    const Plan *plan = PyCapsule_GetPointer(capsule, PLAN);
    Py_buffer source, target;
    if (plan == NULL || !get_buffers(blob, out, &source, &target))
        return NULL;
    PyObject *result = NULL;
    const uint8_t *head = source.buf;
    static const uint8_t zeros[3];
    if (target.len != plan->page_bytes) {
        PyErr_Format(PyExc_ValueError, "a page has %lld bytes, not %zd", (long long)plan->page_bytes, target.len);
    } else if (source.len < HEAD_BYTES || memcmp(head, &plan->digest, 4) || head[4] > 1 || memcmp(head + 5, zeros, 3)) {
        PyErr_SetString(PyExc_ValueError, "the encoding is of another geometry or version");
    } else if (source.len != coded_bytes_of(plan, head[4])) {
        PyErr_Format(PyExc_ValueError, "the encoding has %zd bytes, not %lld", source.len,
                     (long long)coded_bytes_of(plan, head[4]));
    } else if (!scales_are_sound(plan, source.buf, head[4])) {
        PyErr_SetString(PyExc_ValueError, "the encoding has scales that are no numbers");
    } else {
        Py_BEGIN_ALLOW_THREADS
        (portable || !has_avx2() ? decode_portable : decode_avx2)(plan, source.buf, target.buf, head[4]);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&source);
    PyBuffer_Release(&target);
    return result;
}

static PyMethodDef methods[] = {
    {"make_plan", make_plan, METH_VARARGS, "Check where the tensors of a page lie."},
    {"coded_bytes", coded_bytes, METH_VARARGS, "Bytes of a page's encoding."},
    {"encode", encode, METH_VARARGS, "Encode a page."},
    {"decode", decode, METH_VARARGS, "Decode a page."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_quant", "Keys and values in few bits.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__quant(void) { return PyModule_Create(&module); }
