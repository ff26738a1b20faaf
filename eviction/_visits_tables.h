/* What visits have learned, as Python has it: classes as lists of features, their counts as rows of int64. */
#ifndef KVTIERS_VISITS_TABLES_H
#define KVTIERS_VISITS_TABLES_H

#include <Python.h>

#include "_visits.h"

#define ROW_BYTES (NUM_AGES * sizeof(int64_t))

static PyObject *list_of(const int32_t *blocks, int64_t num)
{
    PyObject *list = PyList_New((Py_ssize_t)num);
    for (int64_t i = 0; list != NULL && i < num; i++) {
        PyObject *block = PyLong_FromLong(blocks[i]);
        if (block == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, block);
    }
    return list;
}

static PyObject *features_of(const Survival *survival, int32_t number)
{
    int32_t features[MAX_DEPTH], depth = survival->classes[number].depth;
    for (int32_t i = depth - 1; i >= 0; i--, number = survival->classes[number].parent)
        features[i] = survival->classes[number].feature;
    return list_of(features, depth);
}

static int append_new(PyObject *list, PyObject *item)
{
    int failed = item == NULL ? -1 : PyList_Append(list, item);
    Py_XDECREF(item);
    return failed;
}

static PyObject *rows_of(const Survival *survival, int of_events)
{
    PyObject *rows = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)survival->num_classes * ROW_BYTES);
    for (int32_t number = 0; rows != NULL && number < survival->num_classes; number++) {
        const Class *class = &survival->classes[number];
        memcpy(PyBytes_AS_STRING(rows) + (size_t)number * ROW_BYTES, of_events ? class->events : class->at_risk, ROW_BYTES);
    }
    return rows;
}

/* Return classes, as lists of features; and the rows of each. */
static PyObject *tables_of(const Survival *survival)
{
    PyObject *classes = PyList_New(0);
    for (int32_t number = 0; classes != NULL && number < survival->num_classes; number++)
        if (append_new(classes, features_of(survival, number)) < 0)
            Py_CLEAR(classes);
    PyObject *events = classes == NULL ? NULL : rows_of(survival, 1), *at_risk = events == NULL ? NULL : rows_of(survival, 0);
    PyObject *all = at_risk == NULL ? NULL : PyTuple_Pack(3, classes, events, at_risk);
    Py_XDECREF(classes);
    Py_XDECREF(events);
    Py_XDECREF(at_risk);
    return all;
}

static int take_class(Survival *survival, PyObject *path, const char *events, const char *at_risk)
{
    PyObject *items = PySequence_Fast(path, "a class must be a sequence of features");
    int32_t features[MAX_DEPTH];
    if (items == NULL)
        return -1;
    Py_ssize_t depth = PySequence_Fast_GET_SIZE(items);
    if (depth > MAX_DEPTH)
        PyErr_Format(PyExc_ValueError, "a class of %zd features, not up to %d", depth, MAX_DEPTH);
    for (Py_ssize_t i = 0; !PyErr_Occurred() && i < depth; i++)
        features[i] = (int32_t)PyLong_AsLong(PySequence_Fast_GET_ITEM(items, i));
    Py_DECREF(items);
    if (PyErr_Occurred())
        return -1;
    Class *class = &survival->classes[class_of(survival, features, (int)depth)];
    memcpy(class->events, events, ROW_BYTES);
    memcpy(class->at_risk, at_risk, ROW_BYTES);
    return 0;
}

/* Take in what `tables_of` gave; -1 with an exception where it is something else, or the visits are not new. */
static int take_tables(Visits *visits, PyObject *args)
{
    Survival *survival = &visits->cohorts.survival;
    PyObject *classes, *events, *at_risk;
    if (!PyArg_ParseTuple(args, "O!O!O!", &PyList_Type, &classes, &PyBytes_Type, &events, &PyBytes_Type, &at_risk))
        return -1;
    Py_ssize_t num = PyList_GET_SIZE(classes), wanted = num * (Py_ssize_t)ROW_BYTES;
    if (visits->num_visits || visits->num_resident || survival->num_classes > 1 || num > MAX_CLASSES ||
        PyBytes_GET_SIZE(events) != wanted || PyBytes_GET_SIZE(at_risk) != wanted) {
        PyErr_SetString(PyExc_ValueError, "as many rows as classes are restored, and into visits that are new");
        return -1;
    }
    for (Py_ssize_t i = 0; i < num && i < PyList_GET_SIZE(classes); i++)
        if (take_class(survival, PyList_GET_ITEM(classes, i), PyBytes_AS_STRING(events) + (size_t)i * ROW_BYTES,
                       PyBytes_AS_STRING(at_risk) + (size_t)i * ROW_BYTES) < 0)
            return -1;
    for (int32_t number = 0; number < survival->num_classes; number++)
        class_update(survival, number);
    survival->next_update = 0;
    return 0;
}

#endif
