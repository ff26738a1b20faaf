/* Chained SHA-256 of many small blocks in one call.
 *
 *     chain_sha256(root, blocks, block_bytes, *, portable=False) -> [key[0], key[1], ...]
 *         key[i] = SHA-256(key[i - 1] || block i),  key[-1] = root
 *     bind_sha256(root, hashes, *, portable=False) -> [SHA-256(root || hash) for hash in hashes]
 *     accelerated() -> True where the processor's own SHA instructions are used
 *     untrack(objects, name), track(objects, name) -> None; for radix/untracked.py, which says what it is for
 *
 * Optional: radix/hashing.py has a Python twin of each, and tests hold them equal. Why it exists: through hashlib a block of 16 tokens
 * costs 0.53 us, most of it making and freeing the hash object; here 0.14 us, a third of it for the bytes object returned.
 *
 * The chain is serial (each block needs the hash before it), so there is nothing to do in parallel; the speed comes from
 * compressing in registers and copying each block once. SHA-256 is written here rather than taken from OpenSSL so that the wheel
 * depends on no library; FIPS 180-4 names the functions used below.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_SHA_NI 1
#include <cpuid.h>
#include <immintrin.h>
#endif

#define HASH_BYTES 32
#define CHUNK_BYTES 64   /* what one compression takes in */
#define FEW 64           /* hashes; below this the work (10 us) is not worth giving the GIL away and waiting to get it back */

typedef void (*compress_fn)(uint32_t state[8], const uint8_t *data, size_t num_chunks);

static const uint32_t INITIAL[8] = {
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
};

static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

/* ---- compression, in portable C ---- */

static uint32_t load_be32(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static void store_be32(uint8_t *p, uint32_t x)
{
    p[0] = (uint8_t)(x >> 24);
    p[1] = (uint8_t)(x >> 16);
    p[2] = (uint8_t)(x >> 8);
    p[3] = (uint8_t)x;
}

#define ROTR(x, n) ((x) >> (n) | (x) << (32 - (n)))

/* One round. Instead of moving eight words along, the caller names them shifted by one place each time. */
#define ROUND(a, b, c, d, e, f, g, h, t)                                                                               \
    do {                                                                                                               \
        uint32_t t1 = h + (ROTR(e, 6) ^ ROTR(e, 11) ^ ROTR(e, 25)) + (g ^ (e & (f ^ g))) + K[t] + w[(t) & 15];         \
        d += t1;                                                                                                       \
        h = t1 + (ROTR(a, 2) ^ ROTR(a, 13) ^ ROTR(a, 22)) + ((a & b) | (c & (a | b)));                                 \
    } while (0)

static void compress_portable(uint32_t state[8], const uint8_t *data, size_t num_chunks)
{
    for (; num_chunks; num_chunks--, data += CHUNK_BYTES) {
        uint32_t w[16];  /* the last sixteen words of the schedule, as a ring */
        uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
        for (int t = 0; t < 16; t++)
            w[t] = load_be32(data + 4 * t);
        for (int t = 0; t < 64; t += 8) {
            if (t >= 16) {
                for (int i = t; i < t + 8; i++) {
                    uint32_t w15 = w[(i + 1) & 15], w2 = w[(i + 14) & 15];
                    w[i & 15] += (ROTR(w15, 7) ^ ROTR(w15, 18) ^ w15 >> 3) + w[(i + 9) & 15]
                                 + (ROTR(w2, 17) ^ ROTR(w2, 19) ^ w2 >> 10);
                }
            }
            ROUND(a, b, c, d, e, f, g, h, t);
            ROUND(h, a, b, c, d, e, f, g, t + 1);
            ROUND(g, h, a, b, c, d, e, f, t + 2);
            ROUND(f, g, h, a, b, c, d, e, t + 3);
            ROUND(e, f, g, h, a, b, c, d, t + 4);
            ROUND(d, e, f, g, h, a, b, c, t + 5);
            ROUND(c, d, e, f, g, h, a, b, t + 6);
            ROUND(b, c, d, e, f, g, h, a, t + 7);
        }
        state[0] += a;
        state[1] += b;
        state[2] += c;
        state[3] += d;
        state[4] += e;
        state[5] += f;
        state[6] += g;
        state[7] += h;
    }
}

/* ---- compression, with the SHA extensions of x86-64 ---- */

#ifdef HAVE_SHA_NI

/* The instructions want the state as the lanes (A B E F) and (C D G H), highest lane first. `sha256rnds2` does two rounds; four
 * words of the schedule live in a register, and a ring of four registers holds the last sixteen words. */
__attribute__((target("sha,sse4.1,ssse3")))
static void compress_sha_ni(uint32_t state[8], const uint8_t *data, size_t num_chunks)
{
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
    __m128i abef = _mm_set_epi32((int)state[0], (int)state[1], (int)state[4], (int)state[5]);
    __m128i cdgh = _mm_set_epi32((int)state[2], (int)state[3], (int)state[6], (int)state[7]);

    for (; num_chunks; num_chunks--, data += CHUNK_BYTES) {
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i w[4];
#pragma GCC unroll 16
        for (int g = 0; g < 16; g++) {  /* rounds 4g .. 4g + 3 */
            __m128i *now = &w[g & 3];
            if (g < 4) {
                *now = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(data + 16 * g)), big_endian);
            } else {
                const __m128i back1 = w[(g + 3) & 3], back2 = w[(g + 2) & 3], back3 = w[(g + 1) & 3];
                __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(*now, back3), _mm_alignr_epi8(back1, back2, 4));
                *now = _mm_sha256msg2_epu32(sum, back1);
            }
            const __m128i wk = _mm_add_epi32(*now, _mm_loadu_si128((const __m128i *)(K + 4 * g)));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, wk);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(wk, 0x0e));
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    state[0] = (uint32_t)_mm_extract_epi32(abef, 3);
    state[1] = (uint32_t)_mm_extract_epi32(abef, 2);
    state[2] = (uint32_t)_mm_extract_epi32(cdgh, 3);
    state[3] = (uint32_t)_mm_extract_epi32(cdgh, 2);
    state[4] = (uint32_t)_mm_extract_epi32(abef, 1);
    state[5] = (uint32_t)_mm_extract_epi32(abef, 0);
    state[6] = (uint32_t)_mm_extract_epi32(cdgh, 1);
    state[7] = (uint32_t)_mm_extract_epi32(cdgh, 0);
}

static int cpu_has_sha(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_SSSE3) || !(c & bit_SSE4_1))
        return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & (1u << 29));
}

#endif

static compress_fn fastest = compress_portable;  /* set once, when the module is made */

/* ---- hashing ---- */

/* out = SHA-256(head || body); `out` may be `head`. */
static void hash_joined(compress_fn compress, const uint8_t head[HASH_BYTES], const uint8_t *body, size_t body_bytes,
                        uint8_t out[HASH_BYTES])
{
    const uint64_t total_bits = 8 * (uint64_t)(HASH_BYTES + body_bytes);
    uint32_t state[8];
    uint8_t chunk[2 * CHUNK_BYTES];
    size_t used = HASH_BYTES;

    memcpy(state, INITIAL, sizeof state);
    memcpy(chunk, head, HASH_BYTES);
    if (body_bytes >= CHUNK_BYTES - HASH_BYTES) {
        memcpy(chunk + HASH_BYTES, body, CHUNK_BYTES - HASH_BYTES);
        compress(state, chunk, 1);
        body += CHUNK_BYTES - HASH_BYTES;
        body_bytes -= CHUNK_BYTES - HASH_BYTES;

        const size_t whole = body_bytes / CHUNK_BYTES;
        compress(state, body, whole);
        body += whole * CHUNK_BYTES;
        body_bytes -= whole * CHUNK_BYTES;
        used = 0;
    }
    memcpy(chunk + used, body, body_bytes);
    used += body_bytes;

    /* padding: one bit, zeros, the length in bits; a second chunk where the nine bytes find no room */
    const size_t end = used + 9 <= CHUNK_BYTES ? CHUNK_BYTES : 2 * CHUNK_BYTES;
    chunk[used] = 0x80;
    memset(chunk + used + 1, 0, end - 8 - used - 1);
    store_be32(chunk + end - 8, (uint32_t)(total_bits >> 32));
    store_be32(chunk + end - 4, (uint32_t)total_bits);
    compress(state, chunk, end / CHUNK_BYTES);

    for (int i = 0; i < 8; i++)
        store_be32(out + 4 * i, state[i]);
}

/* ---- the Python face ---- */

static int check_root(Py_ssize_t num_bytes)
{
    if (num_bytes == HASH_BYTES)
        return 1;
    PyErr_Format(PyExc_ValueError, "root is %zd bytes; it must be %d", num_bytes, HASH_BYTES);
    return 0;
}

/* A list of bytes objects from `n` hashes end to end. */
static PyObject *to_list(const uint8_t *hashes, Py_ssize_t n)
{
    PyObject *list = PyList_New(n);
    if (list == NULL)
        return NULL;
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *hash = PyBytes_FromStringAndSize((const char *)hashes + i * HASH_BYTES, HASH_BYTES);
        if (hash == NULL) {
            Py_DECREF(list);
            return NULL;
        }
        PyList_SET_ITEM(list, i, hash);
    }
    return list;
}

static PyObject *chain_sha256(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"root", "blocks", "block_bytes", "portable", NULL};
    const char *root;
    Py_ssize_t root_bytes, block_bytes;
    Py_buffer blocks;
    int portable = 0;
    PyObject *list = NULL;
    uint8_t *keys = NULL;

    (void)self;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "y#y*n|$p", names, &root, &root_bytes, &blocks, &block_bytes, &portable))
        return NULL;
    if (!check_root(root_bytes))
        goto done;
    if (block_bytes < 1 || blocks.len % block_bytes != 0) {
        PyErr_Format(PyExc_ValueError, "blocks is %zd bytes; it must be a multiple of block_bytes (%zd), at least 1",
                     blocks.len, block_bytes);
        goto done;
    }
    const Py_ssize_t n = blocks.len / block_bytes;
    keys = PyMem_RawMalloc((size_t)(n ? n : 1) * HASH_BYTES);
    if (keys == NULL) {
        PyErr_NoMemory();
        goto done;
    }

    const compress_fn compress = portable ? compress_portable : fastest;
    PyThreadState *released = n > FEW ? PyEval_SaveThread() : NULL;
    const uint8_t *before = (const uint8_t *)root;
    for (Py_ssize_t i = 0; i < n; i++) {
        hash_joined(compress, before, (const uint8_t *)blocks.buf + i * block_bytes, (size_t)block_bytes, keys + i * HASH_BYTES);
        before = keys + i * HASH_BYTES;
    }
    if (released != NULL)
        PyEval_RestoreThread(released);
    list = to_list(keys, n);

done:
    PyMem_RawFree(keys);
    PyBuffer_Release(&blocks);
    return list;
}

static PyObject *bind_sha256(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"root", "hashes", "portable", NULL};
    const char *root;
    Py_ssize_t root_bytes;
    PyObject *hashes, *list = NULL;
    int portable = 0;
    uint8_t *keys = NULL;

    (void)self;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "y#O|$p", names, &root, &root_bytes, &hashes, &portable))
        return NULL;
    if (!check_root(root_bytes))
        return NULL;
    /* A tuple of our own keeps every item alive and in place while the GIL is away, whatever happens to the list meanwhile. */
    hashes = PySequence_Tuple(hashes);
    if (hashes == NULL)
        return NULL;
    const Py_ssize_t n = PyTuple_GET_SIZE(hashes);
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *hash = PyTuple_GET_ITEM(hashes, i);
        if (!PyBytes_Check(hash)) {
            PyErr_Format(PyExc_TypeError, "hashes[%zd] is %.80s; it must be bytes", i, Py_TYPE(hash)->tp_name);
            goto done;
        }
    }
    keys = PyMem_RawMalloc((size_t)(n ? n : 1) * HASH_BYTES);
    if (keys == NULL) {
        PyErr_NoMemory();
        goto done;
    }

    const compress_fn compress = portable ? compress_portable : fastest;
    PyThreadState *released = n > FEW ? PyEval_SaveThread() : NULL;
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *hash = PyTuple_GET_ITEM(hashes, i);
        hash_joined(compress, (const uint8_t *)root, (const uint8_t *)PyBytes_AS_STRING(hash), (size_t)PyBytes_GET_SIZE(hash),
                    keys + i * HASH_BYTES);
    }
    if (released != NULL)
        PyEval_RestoreThread(released);
    list = to_list(keys, n);

done:
    PyMem_RawFree(keys);
    Py_DECREF(hashes);
    return list;
}

static PyObject *accelerated(PyObject *self, PyObject *unused)
{
    (void)self;
    (void)unused;
    return PyBool_FromLong(fastest != compress_portable);
}

static void set_tracked(PyObject *object, int tracked)
{
    if (!PyObject_IS_GC(object) || PyObject_GC_IsTracked(object) == tracked)
        return;
    if (tracked)
        PyObject_GC_Track(object);
    else
        PyObject_GC_UnTrack(object);
}

/* Track or untrack the objects of a list; with a name also the tuple that each has by that name, and what is in it. */
static PyObject *track_all(PyObject *args, int tracked)
{
    PyObject *objects, *name = NULL;
    if (!PyArg_ParseTuple(args, "O!|U", &PyList_Type, &objects, &name))
        return NULL;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(objects); i++) {
        PyObject *object = PyList_GET_ITEM(objects, i);
        set_tracked(object, tracked);
        if (name == NULL)
            continue;
        PyObject *parts = PyObject_GetAttr(object, name);
        if (parts == NULL)
            return NULL;
        if (PyTuple_CheckExact(parts) && PyTuple_GET_SIZE(parts)) {  /* the empty one is everybody's */
            for (Py_ssize_t j = 0; j < PyTuple_GET_SIZE(parts); j++)
                set_tracked(PyTuple_GET_ITEM(parts, j), tracked);
            set_tracked(parts, tracked);
        }
        Py_DECREF(parts);
    }
    Py_RETURN_NONE;
}

static PyObject *untrack(PyObject *self, PyObject *args)
{
    (void)self;
    return track_all(args, 0);
}

static PyObject *track(PyObject *self, PyObject *args)
{
    (void)self;
    return track_all(args, 1);
}

static PyMethodDef METHODS[] = {
    {"untrack", untrack, METH_VARARGS,
     "Take the objects of a list, and of a tuple that each has by a name, from the garbage collector."},
    {"track", track, METH_VARARGS, "Undo untrack."},
    {"chain_sha256", (PyCFunction)(void (*)(void))chain_sha256, METH_VARARGS | METH_KEYWORDS,
     "Hash blocks end to end, each together with the hash before it; the first with root. Returns a list of 32-byte hashes."},
    {"bind_sha256", (PyCFunction)(void (*)(void))bind_sha256, METH_VARARGS | METH_KEYWORDS,
     "Hash root || hash for each hash of a sequence of bytes. Returns a list of 32-byte hashes."},
    {"accelerated", accelerated, METH_NOARGS, "True where the processor's own SHA instructions are used."},
    {NULL, NULL, 0, NULL},
};

static int execute(PyObject *module)
{
    (void)module;
#ifdef HAVE_SHA_NI
    if (cpu_has_sha())
        fastest = compress_sha_ni;
#endif
    return 0;
}

static PyModuleDef_Slot SLOTS[] = {
    {Py_mod_exec, execute},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef MODULE = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "radix._chain",
    .m_doc = "Chained SHA-256 of many small blocks in one call.",
    .m_methods = METHODS,
    .m_slots = SLOTS,
};

PyMODINIT_FUNC PyInit__chain(void)
{
    return PyModuleDef_Init(&MODULE);
}
