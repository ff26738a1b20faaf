/* Arguments from Python: a trace's arrays, and arrays that run beside it. All is checked here. */
#ifndef KVTIERS_SWEEP_ARGUMENTS_H
#define KVTIERS_SWEEP_ARGUMENTS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    Py_buffer offsets, ids;
    const int64_t *starts;
    const int32_t *blocks;
    int32_t num_requests, longest;
    int64_t num_blocks;
} Trace;

/* A contiguous array of `item_bytes` each; -1 with an exception if it is none. */
static int get_array(PyObject *object, Py_buffer *view, Py_ssize_t item_bytes, int is_writable, const char *name)
{
    if (PyObject_GetBuffer(object, view, is_writable ? PyBUF_CONTIG : PyBUF_CONTIG_RO) < 0)
        return -1;
    if (view->itemsize == item_bytes)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s has items of %zd bytes, not %zd", name, view->itemsize, item_bytes);
    PyBuffer_Release(view);
    return -1;
}

static void release_trace(Trace *trace)
{
    PyBuffer_Release(&trace->offsets);
    PyBuffer_Release(&trace->ids);
}

static int check_trace(Trace *trace)
{
    int64_t num_requests = trace->offsets.len / 8 - 1, num_ids = trace->ids.len / 4, longest = 0;
    if (num_requests < 0 || num_requests >= INT32_MAX || trace->num_blocks < 0 || trace->num_blocks >= INT32_MAX / 2)
        return -1;
    trace->starts = trace->offsets.buf;
    trace->blocks = trace->ids.buf;
    if (trace->starts[0] != 0 || trace->starts[num_requests] != num_ids)
        return -1;
    for (int64_t i = 0; i < num_requests; i++) {
        int64_t length = trace->starts[i + 1] - trace->starts[i];
        if (length < 0 || length > num_ids)
            return -1;
        longest = length > longest ? length : longest;
    }
    for (int64_t i = 0; i < num_ids; i++)
        if (trace->blocks[i] < 0 || trace->blocks[i] >= trace->num_blocks)
            return -1;
    trace->num_requests = (int32_t)num_requests;
    trace->longest = (int32_t)longest;
    return longest >= INT32_MAX ? -1 : 0;
}

static int get_trace(PyObject *offsets, PyObject *ids, Py_ssize_t num_blocks, Trace *trace)
{
    memset(trace, 0, sizeof *trace);
    trace->num_blocks = num_blocks;
    if (get_array(offsets, &trace->offsets, 8, 0, "offsets") < 0)
        return -1;
    if (get_array(ids, &trace->ids, 4, 0, "ids") < 0) {
        PyBuffer_Release(&trace->offsets);
        return -1;
    }
    if (check_trace(trace) < 0) {
        PyErr_SetString(PyExc_ValueError, "offsets and ids are not those of a trace of so many blocks");
        release_trace(trace);
        return -1;
    }
    return 0;
}

/* An array with `num_items` items, which belong to the trace's requests or references. */
static int get_parallel(PyObject *object, Py_buffer *view, Py_ssize_t item_bytes, int64_t num_items, int is_writable,
                        const char *name)
{
    if (get_array(object, view, item_bytes, is_writable, name) < 0)
        return -1;
    if (view->len == num_items * item_bytes)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s has %zd items, not %lld", name, view->len / item_bytes, (long long)num_items);
    PyBuffer_Release(view);
    return -1;
}

#endif
