/* Visits for Python: see visits.py, whose class this one takes the place of where it is built.
 *
 *   Visits(least_ghosts=4096)
 *     visit(blocks, now, reason, last_turn, reply_tokens) -> blocks that are forgotten
 *     arrive(blocks), touch(blocks)
 *     leave(blocks) -> blocks that are forgotten
 *     victims(n) -> blocks
 *     advance(now)
 *     worth(blocks, now) -> floats
 *     prospects(last, num_known, blocks, now, last_turn) -> floats
 *     counts() -> (classes, events, at_risk), restore(classes, events, at_risk): lists of features, rows of int64
 *     num_remembered, num_cohorts
 *
 * Blocks are lists of small numbers. A call that raises has changed nothing, but `restore`.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_visits.h"
#include "_visits_tables.h"

typedef struct {
    PyObject_HEAD
    Visits visits;
    int32_t *path; /* room for what a call was given */
    Py_ssize_t room;
} Object;

/* ---- what sweeps do not ask for ---- */

/* Resident blocks, root first, were used: those that no visit has told of are the newest of these again. */
static void visits_touch(Visits *visits, const int32_t *path, int32_t length)
{
    int32_t fresh = 0;
    for (int32_t i = 0; i < length; i++) {
        Known *this = &visits->blocks[path[i]];
        int32_t before = this->cohort;
        if (!this->is_resident || visits->cohorts.cohorts[before].size || before == fresh)
            continue;
        if (!fresh)
            fresh = new_cohort(&visits->cohorts, 0, 0, 0);
        unlink_known(visits, path[i]);
        change_resident(visits, before, -1);
        part(visits, before, 1);
        this->cohort = fresh;
        this->depth = i;
        visits->cohorts.cohorts[fresh].num_live++;
        link_known(visits, path[i]);
        change_resident(visits, fresh, 1);
    }
}

/* ---- arguments ---- */

static int32_t *room_for(Object *self, Py_ssize_t num)
{
    if (num > self->room) {
        int32_t *grown = num < INT32_MAX ? realloc(self->path, (size_t)num * sizeof *grown) : NULL;
        if (grown == NULL) {
            PyErr_NoMemory();
            return NULL;
        }
        self->path = grown;
        self->room = num;
    }
    return self->path;
}

/* Take a list of blocks, and have room for them and for a cohort of each; how many there are, or -1 with an exception. */
static Py_ssize_t take_blocks(Object *self, PyObject *blocks)
{
    if (!PyList_CheckExact(blocks)) {
        PyErr_SetString(PyExc_TypeError, "blocks must be a list of numbers");
        return -1;
    }
    Py_ssize_t num = PyList_GET_SIZE(blocks);
    int32_t *path = room_for(self, num ? num : 1);
    if (path == NULL)
        return -1;
    long highest = -1;
    for (Py_ssize_t i = 0; i < num; i++) {
        PyObject *item = PyList_GET_ITEM(blocks, i);
        long block = PyLong_CheckExact(item) ? PyLong_AsLong(item) : -1;
        if (block < 0 || block >= INT32_MAX / 2) {
            if (!PyErr_Occurred())
                PyErr_Format(PyExc_ValueError, "%R is no number of a block", item);
            return -1;
        }
        path[i] = (int32_t)block;
        highest = block > highest ? block : highest;
    }
    if (reserve_blocks(&self->visits, highest + 1) < 0 || reserve_cohorts(&self->visits.cohorts, num + 1) < 0) {
        PyErr_NoMemory();
        return -1;
    }
    return num;
}

/* Name what was forgotten. Where that fails the list stays for the next call. */
static PyObject *take_forgotten(Object *self)
{
    Visits *visits = &self->visits;
    PyObject *list = PyList_New(0);
    for (int32_t block = visits->forgotten; list != NULL && block != NO_BLOCK; block = visits->blocks[block].next) {
        PyObject *number = PyLong_FromLong(block);
        if (number == NULL || PyList_Append(list, number) < 0)
            Py_CLEAR(list);
        Py_XDECREF(number);
    }
    if (list != NULL)
        visits->forgotten = NO_BLOCK;
    return list;
}

/* ---- methods ---- */

static PyObject *visit(PyObject *object, PyObject *args)
{
    Object *self = (Object *)object;
    PyObject *blocks;
    double now;
    Told told;
    if (!PyArg_ParseTuple(args, "Odiii", &blocks, &now, &told.reason, &told.last_turn, &told.reply_tokens))
        return NULL;
    Py_ssize_t num = take_blocks(self, blocks);
    if (num < 0)
        return NULL;
    visits_visit(&self->visits, self->path, (int32_t)num, told, now);
    return take_forgotten(self);
}

static PyObject *arrive(PyObject *object, PyObject *blocks)
{
    Object *self = (Object *)object;
    Py_ssize_t num = take_blocks(self, blocks);
    if (num < 0)
        return NULL;
    visits_arrive(&self->visits, self->path, (int32_t)num);
    Py_RETURN_NONE;
}

static PyObject *touch(PyObject *object, PyObject *blocks)
{
    Object *self = (Object *)object;
    Py_ssize_t num = take_blocks(self, blocks);
    if (num < 0)
        return NULL;
    visits_touch(&self->visits, self->path, (int32_t)num);
    Py_RETURN_NONE;
}

static PyObject *leave(PyObject *object, PyObject *blocks)
{
    Object *self = (Object *)object;
    Py_ssize_t num = take_blocks(self, blocks);
    if (num < 0)
        return NULL;
    visits_leave(&self->visits, self->path, (int32_t)num);
    return take_forgotten(self);
}

static PyObject *victims(PyObject *object, PyObject *arg)
{
    Object *self = (Object *)object;
    Py_ssize_t num = PyNumber_AsSsize_t(arg, PyExc_OverflowError);
    if (num == -1 && PyErr_Occurred())
        return NULL;
    int64_t most = self->visits.num_resident;
    num = num < 0 ? 0 : num < most ? num : (Py_ssize_t)most;
    int32_t *out = room_for(self, num ? num : 1);
    return out == NULL ? NULL : list_of(out, visits_victims(&self->visits, num, out));
}

static PyObject *advance(PyObject *object, PyObject *arg)
{
    double now = PyFloat_AsDouble(arg);
    if (now == -1.0 && PyErr_Occurred())
        return NULL;
    visits_advance(&((Object *)object)->visits, now);
    Py_RETURN_NONE;
}

static PyObject *worth(PyObject *object, PyObject *args)
{
    Object *self = (Object *)object;
    PyObject *blocks;
    double now;
    if (!PyArg_ParseTuple(args, "Od", &blocks, &now))
        return NULL;
    Py_ssize_t num = take_blocks(self, blocks);
    PyObject *list = num < 0 ? NULL : PyList_New(num);
    for (Py_ssize_t i = 0; list != NULL && i < num; i++) {
        PyObject *value = PyFloat_FromDouble(visits_worth(&self->visits, self->path[i], now));
        if (value == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, value);
    }
    return list;
}

static PyObject *prospects(PyObject *object, PyObject *args)
{
    Object *self = (Object *)object;
    PyObject *blocks;
    int last, num_known;
    double now;
    Told told = {UNKNOWN, UNKNOWN, UNKNOWN};
    int32_t features[MAX_DEPTH];
    if (!PyArg_ParseTuple(args, "iiOdi", &last, &num_known, &blocks, &now, &told.last_turn))
        return NULL;
    Visits *visits = &self->visits;
    if (num_known && (last < 0 || last >= visits->num_blocks || !visits->blocks[last].cohort))
        return PyErr_Format(PyExc_ValueError, "%d is no block that is remembered", last);
    Py_ssize_t num = take_blocks(self, blocks);
    PyObject *list = num < 0 ? NULL : PyList_New(num);
    int num_features = find_features(visits, last, num_known, told, time_at(visits, now), features + 1) + 1;
    for (Py_ssize_t i = 0; list != NULL && i < num; i++) {
        PyObject *value = PyFloat_FromDouble(visits_prospect(visits, self->path[i], features, num_features));
        if (value == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, value);
    }
    return list;
}

static PyObject *counts(PyObject *object, PyObject *unused)
{
    (void)unused;
    return tables_of(&((Object *)object)->visits.cohorts.survival);
}

static PyObject *restore(PyObject *object, PyObject *args)
{
    return take_tables(&((Object *)object)->visits, args) < 0 ? NULL : Py_NewRef(Py_None);
}

/* ---- the type ---- */

static PyObject *new_object(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"least_ghosts", NULL};
    long long least_ghosts = LEAST_GHOSTS;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|L", names, &least_ghosts))
        return NULL;
    Object *self = (Object *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    if (make_visits(&self->visits) < 0) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    self->visits.least_ghosts = least_ghosts;
    return (PyObject *)self;
}

static void dealloc(PyObject *object)
{
    Object *self = (Object *)object;
    PyTypeObject *type = Py_TYPE(object);
    free_visits(&self->visits);
    free(self->path);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyObject *num_remembered(PyObject *object, void *closure)
{
    const Visits *visits = &((Object *)object)->visits;
    (void)closure;
    return PyLong_FromLongLong(visits->num_resident + visits->num_ghosts);
}

static PyObject *num_cohorts(PyObject *object, void *closure)
{
    const Cohorts *all = &((Object *)object)->visits.cohorts;
    int32_t num = all->num_cohorts - 1;
    (void)closure;
    for (int32_t cohort = all->free; cohort; cohort = all->cohorts[cohort].next)
        num--;
    return PyLong_FromLong(num);
}

static PyMethodDef METHODS[] = {
    {"visit", visit, METH_VARARGS, "Book a request that has ended; return blocks that are forgotten."},
    {"arrive", arrive, METH_O, "Blocks, root first, became resident."},
    {"touch", touch, METH_O, "Resident blocks, root first, were used."},
    {"leave", leave, METH_O, "Blocks are not resident any more; return those that are forgotten."},
    {"victims", victims, METH_O, "Return so many resident blocks, those that are worth least first."},
    {"advance", advance, METH_O, "Time goes on."},
    {"worth", worth, METH_VARARGS, "Return what blocks are worth at a time."},
    {"prospects", prospects, METH_VARARGS, "Return what blocks will be worth when a request has used them."},
    {"counts", counts, METH_NOARGS, "Return what was learned: classes, events and what was at risk."},
    {"restore", restore, METH_VARARGS, "Take in what counts() gave; into new visits only."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef ATTRIBUTES[] = {
    {"num_remembered", num_remembered, NULL, "Blocks that are resident or remembered.", NULL},
    {"num_cohorts", num_cohorts, NULL, "Cohorts of these blocks.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot TYPE_SLOTS[] = {
    {Py_tp_doc, "Who used which blocks last, and what that says about their next use."},
    {Py_tp_new, new_object},
    {Py_tp_dealloc, dealloc},
    {Py_tp_methods, METHODS},
    {Py_tp_getset, ATTRIBUTES},
    {0, NULL},
};

static PyType_Spec TYPE = {
    .name = "eviction._visits.Visits",
    .basicsize = sizeof(Object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = TYPE_SLOTS,
};

static int execute(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &TYPE, NULL);
    int failed = type == NULL ? -1 : PyModule_AddType(module, (PyTypeObject *)type);
    Py_XDECREF(type);
    return failed;
}

static PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, execute}, {0, NULL}};

static struct PyModuleDef MODULE = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "eviction._visits",
    .m_doc = "Visits of blocks, compiled.",
    .m_slots = SLOTS,
};

PyMODINIT_FUNC PyInit__visits(void) { return PyModuleDef_Init(&MODULE); }
