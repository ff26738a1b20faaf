/* Iterators over the table of radix/_ordered.c: keys, values or pairs, from either end. A change of it ends them. */
#include "_ordered.h"

typedef struct {
    PyTypeObject *map;
    PyTypeObject *walk;
} State;

enum { KEYS, VALUES, ITEMS }; /* of a walk */

typedef struct {
    PyObject_HEAD
    Map *map; /* NULL when it has ended */
    Entry *next;
    size_t version;
    int what;
    int is_reversed;
} Walk;

/* self: an OrderedMap. Its type cannot be derived from, so it is the module's own. */
static PyObject *new_walk(PyObject *self, int what, int is_reversed)
{
    Map *map = (Map *)self;
    PyTypeObject *type = ((State *)PyType_GetModuleState(Py_TYPE(self)))->walk;
    Walk *walk = (Walk *)type->tp_alloc(type, 0);
    if (walk == NULL)
        return NULL;
    walk->map = (Map *)Py_NewRef(self);
    walk->next = is_reversed ? map->newest : map->oldest;
    walk->version = map->version;
    walk->what = what;
    walk->is_reversed = is_reversed;
    return (PyObject *)walk;
}

static void walk_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(((Walk *)self)->map);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *walk_next(PyObject *self)
{
    Walk *walk = (Walk *)self;
    if (walk->map == NULL)
        return NULL;
    if (walk->version != walk->map->version) {
        PyErr_SetString(PyExc_RuntimeError, "OrderedMap changed during iteration");
        return NULL;
    }
    Entry *entry = walk->next;
    if (entry == NULL) {
        Py_CLEAR(walk->map);
        return NULL;
    }
    walk->next = walk->is_reversed ? entry->older : entry->newer;
    if (walk->what == ITEMS) {
        PyObject *key = Py_NewRef(entry->key), *value = Py_NewRef(entry->value);
        PyObject *pair = PyTuple_Pack(2, key, value); /* may collect garbage, and so run code that removes the entry */
        Py_DECREF(key);
        Py_DECREF(value);
        return pair;
    }
    return Py_NewRef(walk->what == KEYS ? entry->key : entry->value);
}

static PyType_Slot WALK_SLOTS[] = {
    {Py_tp_dealloc, walk_dealloc},
    {Py_tp_iter, PyObject_SelfIter},
    {Py_tp_iternext, walk_next},
    {0, NULL},
};

static PyType_Spec WALK_SPEC = {
    .name = "radix._ordered.OrderedMapIterator",
    .basicsize = sizeof(Walk),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = WALK_SLOTS,
};
