/* The compiled engine of sweeps: plays a trace of blocks through stores of many sizes and policies.
 *
 *   next_uses(offsets, ids, num_blocks, out)
 *   play(offsets, ids, times, told, num_blocks, policy, capacities, ttl_s, options, hits, on_progress) -> written
 *   optimum(offsets, ids, next_uses, num_blocks, capacity, must_keep, hits, on_progress)
 *   access(offsets, ids, num_blocks, policy, capacity) -> hits
 *   POLICIES: the names that it knows
 *
 * offsets: int64, one more than requests; ids: int32, the blocks of all requests, each in [0, num_blocks). times: double.
 * told: int32, shape (num_requests, 3): finish reason, last turn and reply tokens, -1 where unknown.
 * hits: int32, shape (num_requests, num_tiers), filled. Everything is checked before the first request is played. Without
 * the GIL; on_progress(references so far) is called about once for a million references, and may raise.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_sweep_arc.h"
#include "_sweep_arguments.h"
#include "_sweep_flat.h"
#include "_sweep_fleet.h"
#include "_sweep_lfu.h"
#include "_sweep_lru.h"
#include "_sweep_min.h"
#include "_sweep_outlook.h"
#include "_sweep_s3fifo.h"
#include "_sweep_sieve.h"

static const PolicyKind *const KINDS[] = {&LRU, &FIFO, &LFU, &ARC, &SIEVE, &S3FIFO, &TOLD_S3FIFO, &OUTLOOK};
enum { NUM_KINDS = sizeof KINDS / sizeof *KINDS, STEP_REFERENCES = 1 << 20 };

static const PolicyKind *find_kind(const char *name)
{
    for (int i = 0; i < NUM_KINDS; i++)
        if (strcmp(KINDS[i]->name, name) == 0)
            return KINDS[i];
    PyErr_Format(PyExc_ValueError, "no policy here is called %s", name);
    return NULL;
}

/* Tell how far a play is; -1 with an exception if it must end. */
static int told(PyObject *on_progress, int64_t num_references)
{
    if (PyErr_CheckSignals() < 0)
        return -1;
    if (on_progress == Py_None)
        return 0;
    PyObject *answer = PyObject_CallFunction(on_progress, "L", (long long)num_references);
    Py_XDECREF(answer);
    return answer == NULL ? -1 : 0;
}

/* The first request that is not in the same step as `first`. */
static int32_t step_end(const Trace *trace, int32_t first)
{
    int64_t until = trace->starts[first] + STEP_REFERENCES;
    while (first < trace->num_requests && trace->starts[first] < until)
        first++;
    return first;
}

/* ---- what is used again when ---- */

static PyObject *sweep_next_uses(PyObject *module, PyObject *args)
{
    PyObject *offsets, *ids, *out;
    Py_ssize_t num_blocks;
    Trace trace;
    Py_buffer view;
    if (!PyArg_ParseTuple(args, "OOnO", &offsets, &ids, &num_blocks, &out) || get_trace(offsets, ids, num_blocks, &trace) < 0)
        return NULL;
    if (get_parallel(out, &view, 4, trace.ids.len / 4, 1, "out") < 0) {
        release_trace(&trace);
        return NULL;
    }
    int32_t *seen = malloc(((size_t)num_blocks + 1) * sizeof *seen), *uses = view.buf;
    if (seen != NULL) {
        for (Py_ssize_t i = 0; i < num_blocks; i++)
            seen[i] = trace.num_requests;
        for (int32_t request = trace.num_requests - 1; request >= 0; request--) {
            for (int64_t i = trace.starts[request]; i < trace.starts[request + 1]; i++)
                uses[i] = seen[trace.blocks[i]];
            for (int64_t i = trace.starts[request]; i < trace.starts[request + 1]; i++)
                seen[trace.blocks[i]] = request;
        }
        free(seen);
    }
    PyBuffer_Release(&view);
    release_trace(&trace);
    return seen == NULL ? PyErr_NoMemory() : Py_NewRef(Py_None);
}

/* ---- play ---- */

typedef struct {
    int is_exclusive, on_second_use, num_stores, by_prefix;
    double writes_per_day, blocks_per_s; /* of the tier below host memory; less than 0 for any number */
} Options;

/* Where memory lacks, `memory` tells it, and the fleet is not to be played. NULL, or a fleet for `free_orders`. */
static Fleet *make_fleet(Memory *memory, const Trace *trace, const PolicyKind *kind, int num_tiers, const int64_t *capacities,
                         double ttl_s, const Options *options)
{
    Fleet *fleet = new_array(memory, 1, sizeof *fleet);
    if (fleet == NULL)
        return NULL;
    fleet->stores = new_array(memory, (size_t)options->num_stores, sizeof(Store));
    fleet->queued = new_array(memory, (size_t)options->num_stores, sizeof(double));
    fleet->num_stores = options->num_stores;
    fleet->by_prefix = options->by_prefix;
    fleet->blocks_per_s = options->blocks_per_s;
    for (int i = 0; fleet->stores != NULL && i < options->num_stores; i++) {
        Store *store = &fleet->stores[i];
        make_store(store, memory, kind, (int32_t)trace->num_blocks, trace->longest, ttl_s, num_tiers, capacities);
        store->is_exclusive = options->is_exclusive;
        store->on_second_use = options->on_second_use;
        store->budget_tier = options->writes_per_day >= 0 && num_tiers > 1;
        store->writes_per_day = options->writes_per_day;
        store->writes_left = options->writes_per_day * BUDGET_S / DAY_S; /* as the planner's, which begins full */
    }
    return fleet;
}

static int play_all(Fleet *fleet, const Memory *memory, const Trace *trace, const double *times, const Told *told_at_end,
                    int32_t *hits, int num_tiers, PyObject *on_progress)
{
    double now = trace->num_requests ? times[0] : 0;
    fleet->looked_at = now;
    for (int i = 0; i < fleet->num_stores; i++)
        fleet->stores[i].counted_at = now;
    for (int32_t first = 0; first < trace->num_requests;) {
        int32_t end = step_end(trace, first);
        Py_BEGIN_ALLOW_THREADS
        for (; first < end; first++) {
            now = times[first] > now ? times[first] : now;
            fleet_serve(fleet, trace->blocks + trace->starts[first], (int32_t)(trace->starts[first + 1] - trace->starts[first]),
                        told_at_end[first], now, hits + (int64_t)first * num_tiers);
        }
        Py_END_ALLOW_THREADS
        if (memory->has_failed) {
            PyErr_NoMemory();
            return -1;
        }
        if (told(on_progress, trace->starts[first]) < 0)
            return -1;
    }
    return 0;
}

static PyObject *written_of(const Fleet *fleet, int num_tiers)
{
    PyObject *written = PyTuple_New(num_tiers);
    for (int number = 0; written != NULL && number < num_tiers; number++) {
        int64_t sum = 0;
        for (int i = 0; i < fleet->num_stores; i++)
            sum += fleet->stores[i].tiers[number].written;
        PyObject *count = PyLong_FromLongLong(sum);
        if (count == NULL)
            Py_CLEAR(written);
        else
            PyTuple_SET_ITEM(written, number, count);
    }
    return written;
}

static int get_capacities(PyObject *capacities, int64_t *out)
{
    Py_ssize_t num_tiers = PyTuple_GET_SIZE(capacities);
    if (num_tiers < 1 || num_tiers > MAX_TIERS) {
        PyErr_Format(PyExc_ValueError, "%zd tiers; 1 to %d can be played", num_tiers, MAX_TIERS);
        return -1;
    }
    for (Py_ssize_t i = 0; i < num_tiers; i++) {
        out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(capacities, i));
        if (out[i] < 1) {
            if (!PyErr_Occurred())
                PyErr_Format(PyExc_ValueError, "a tier of %lld blocks", (long long)out[i]);
            return -1;
        }
    }
    return (int)num_tiers;
}

static PyObject *sweep_play(PyObject *module, PyObject *args)
{
    PyObject *offsets, *ids, *times, *told_at_end, *capacities, *hits, *on_progress, *written = NULL;
    Py_ssize_t num_blocks;
    const char *policy;
    double ttl_s;
    Options options;
    int64_t sizes[MAX_TIERS];
    Trace trace;
    Py_buffer time_view, told_view, hit_view;
    if (!PyArg_ParseTuple(args, "OOOOnsO!d(ppipdd)OO", &offsets, &ids, &times, &told_at_end, &num_blocks, &policy, &PyTuple_Type, &capacities,
                          &ttl_s, &options.is_exclusive, &options.on_second_use, &options.num_stores, &options.by_prefix,
                          &options.writes_per_day, &options.blocks_per_s, &hits, &on_progress))
        return NULL;
    const PolicyKind *kind = find_kind(policy);
    int num_tiers = kind == NULL ? -1 : get_capacities(capacities, sizes);
    if (num_tiers < 0)
        return NULL;
    if (options.num_stores < 1) {
        PyErr_Format(PyExc_ValueError, "%d stores", options.num_stores);
        return NULL;
    }
    if (get_trace(offsets, ids, num_blocks, &trace) < 0)
        return NULL;
    if (get_parallel(times, &time_view, 8, trace.num_requests, 0, "times") < 0)
        goto no_times;
    if (get_parallel(told_at_end, &told_view, 4, 3 * (int64_t)trace.num_requests, 0, "told") < 0)
        goto no_told;
    if (get_parallel(hits, &hit_view, 4, (int64_t)trace.num_requests * num_tiers, 1, "hits") < 0)
        goto no_hits;
    memset(hit_view.buf, 0, (size_t)hit_view.len);
    Memory memory = {0};
    Fleet *fleet = make_fleet(&memory, &trace, kind, num_tiers, sizes, ttl_s, &options);
    if (memory.has_failed)
        PyErr_NoMemory();
    else if (play_all(fleet, &memory, &trace, time_view.buf, told_view.buf, hit_view.buf, num_tiers, on_progress) == 0)
        written = written_of(fleet, num_tiers);
    if (fleet != NULL)
        free_orders(fleet);
    free_memory(&memory);
    PyBuffer_Release(&hit_view);
no_hits:
    PyBuffer_Release(&told_view);
no_told:
    PyBuffer_Release(&time_view);
no_times:
    release_trace(&trace);
    return written;
}

/* ---- the optimum ---- */

static int find_optimum(const Trace *trace, const int32_t *uses, int64_t capacity, int must_keep, int32_t *hits,
                        PyObject *on_progress)
{
    Memory memory = {0};
    Optimum optimum = {0};
    int failed = 0;
    make_optimum(&optimum, &memory, (int32_t)trace->num_blocks, trace->num_requests, capacity);
    if (memory.has_failed) {
        PyErr_NoMemory();
        failed = -1;
    }
    for (int32_t first = 0; first < trace->num_requests && !failed;) {
        int32_t end = step_end(trace, first);
        Py_BEGIN_ALLOW_THREADS
        for (; first < end; first++) {
            int64_t start = trace->starts[first];
            int32_t length = (int32_t)(trace->starts[first + 1] - start);
            hits[first] = optimum_serve(&optimum, first, trace->blocks + start, uses + start, length, must_keep);
        }
        Py_END_ALLOW_THREADS
        failed = told(on_progress, trace->starts[first]);
    }
    free_memory(&memory);
    return failed;
}

static PyObject *sweep_optimum(PyObject *module, PyObject *args)
{
    PyObject *offsets, *ids, *next_uses, *hits, *on_progress, *done = NULL;
    Py_ssize_t num_blocks;
    long long capacity;
    int must_keep;
    Trace trace;
    Py_buffer use_view, hit_view;
    if (!PyArg_ParseTuple(args, "OOOnLpOO", &offsets, &ids, &next_uses, &num_blocks, &capacity, &must_keep, &hits, &on_progress))
        return NULL;
    if (capacity < 1)
        return PyErr_Format(PyExc_ValueError, "a store of %lld blocks", capacity);
    if (get_trace(offsets, ids, num_blocks, &trace) < 0)
        return NULL;
    if (get_parallel(next_uses, &use_view, 4, trace.ids.len / 4, 0, "next_uses") < 0)
        goto no_uses;
    if (get_parallel(hits, &hit_view, 4, trace.num_requests, 1, "hits") < 0)
        goto no_hits;
    const int32_t *uses = use_view.buf;
    for (int32_t request = 0; request < trace.num_requests; request++)
        for (int64_t i = trace.starts[request]; i < trace.starts[request + 1]; i++)
            if (uses[i] <= request || uses[i] > trace.num_requests) {
                PyErr_SetString(PyExc_ValueError, "next_uses are not those of the trace");
                goto no_play;
            }
    if (find_optimum(&trace, uses, capacity, must_keep, hit_view.buf, on_progress) == 0)
        done = Py_NewRef(Py_None);
no_play:
    PyBuffer_Release(&hit_view);
no_hits:
    PyBuffer_Release(&use_view);
no_uses:
    release_trace(&trace);
    return done;
}

/* ---- a cache of single blocks ---- */

static int access_all(FlatCache *cache, const Trace *trace)
{
    for (int32_t first = 0; first < trace->num_requests;) {
        int32_t end = step_end(trace, first);
        Py_BEGIN_ALLOW_THREADS
        for (int64_t i = trace->starts[first]; i < trace->starts[end]; i++)
            flat_access(cache, trace->blocks[i]);
        Py_END_ALLOW_THREADS
        first = end;
        if (PyErr_CheckSignals() < 0)
            return -1;
    }
    return 0;
}

static PyObject *sweep_access(PyObject *module, PyObject *args)
{
    PyObject *offsets, *ids, *hits = NULL;
    Py_ssize_t num_blocks;
    const char *policy;
    long long capacity;
    Trace trace;
    if (!PyArg_ParseTuple(args, "OOnsL", &offsets, &ids, &num_blocks, &policy, &capacity))
        return NULL;
    const PolicyKind *kind = find_kind(policy);
    if (kind == NULL)
        return NULL;
    if (kind->ended != NULL)
        return PyErr_Format(PyExc_ValueError, "%s orders what requests tell of, and here are none", policy);
    if (capacity < 1)
        return PyErr_Format(PyExc_ValueError, "a cache of %lld blocks", capacity);
    if (get_trace(offsets, ids, num_blocks, &trace) < 0)
        return NULL;
    Memory memory = {0};
    FlatCache cache = {0};
    make_flat(&cache, &memory, kind, (int32_t)num_blocks, capacity);
    if (memory.has_failed)
        PyErr_NoMemory();
    else if (access_all(&cache, &trace) == 0)
        hits = PyLong_FromLongLong(cache.hits);
    free_memory(&memory);
    release_trace(&trace);
    return hits;
}

static PyMethodDef METHODS[] = {
    {"next_uses", sweep_next_uses, METH_VARARGS, "Fill in for each reference the number of the next request with its block."},
    {"play", sweep_play, METH_VARARGS, "Play a trace through stores; return the blocks written to each tier."},
    {"optimum", sweep_optimum, METH_VARARGS, "Fill in how many blocks of each request the offline optimum hits."},
    {"access", sweep_access, METH_VARARGS, "Give a cache of single blocks one after the other; return how many it had."},
    {NULL, NULL, 0, NULL},
};

static int exec_module(PyObject *module)
{
    PyObject *names = PyTuple_New(NUM_KINDS);
    for (int i = 0; names != NULL && i < NUM_KINDS; i++) {
        PyObject *name = PyUnicode_FromString(KINDS[i]->name);
        if (name == NULL)
            Py_CLEAR(names);
        else
            PyTuple_SET_ITEM(names, i, name);
    }
    int failed = names == NULL ? -1 : PyModule_AddObjectRef(module, "POLICIES", names);
    Py_XDECREF(names);
    return failed;
}

static PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, exec_module}, {0, NULL}};

static PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, .m_name = "_sweep", .m_doc = "The compiled engine of sweeps.", .m_methods = METHODS, .m_slots = SLOTS};

PyMODINIT_FUNC PyInit__sweep(void) { return PyModuleDef_Init(&MODULE); }
