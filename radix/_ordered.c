/* A map in the order of insertion that never copies itself.
 *
 *     OrderedMap()   as collections.OrderedDict, as far as radix/ordered.py says
 *
 * Optional: without it radix/ordered.py takes OrderedDict. Why it exists: a dict that is full is copied into a larger
 * one, and one whose keys come and go is copied again and again: 160 ms at 1.4 million keys, 250 to 440 ms in an LRU of
 * a million, in one call, under a lock. Here the table grows and shrinks by one bucket for each key (radix/_ordered.h).
 *
 * The garbage collector does not know of these objects, as of all that a store keeps by the million (radix/untracked.py):
 * no cycle of references may go through one.
 */
#include "_ordered_walk.h"

/* ---- the map's methods ---- */

static PyObject *missing(PyObject *key)
{
    PyErr_SetObject(PyExc_KeyError, key);
    return NULL;
}

static PyObject *map_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    if (PyTuple_GET_SIZE(args) || (kwargs != NULL && PyDict_GET_SIZE(kwargs))) {
        PyErr_SetString(PyExc_TypeError, "OrderedMap() takes no arguments; use update");
        return NULL;
    }
    Map *map = (Map *)type->tp_alloc(type, 0);
    if (map == NULL)
        return NULL;
    map->num_buckets = FEWEST;
    map->mask = FEWEST - 1;
    if (make_bucket(map, 0) < 0) {
        Py_DECREF(map);
        return NULL;
    }
    return (PyObject *)map;
}

static void map_dealloc(PyObject *self)
{
    Map *map = (Map *)self;
    PyTypeObject *type = Py_TYPE(self);
    if (map->segments != NULL && map->segments[0] != NULL)
        clear_map(map);
    for (Py_ssize_t i = 0; i < map->num_segments; i++)
        PyMem_Free(map->segments[i]);
    PyMem_Free(map->segments);
    type->tp_free(self);
    Py_DECREF(type);
}

static Py_ssize_t map_length(PyObject *self)
{
    return ((Map *)self)->num_entries;
}

static int map_has(PyObject *self, PyObject *key)
{
    size_t hash;
    Entry **place = find_key((Map *)self, key, &hash);
    return place == NULL ? -1 : *place != NULL;
}

static PyObject *map_contains(PyObject *self, PyObject *key)
{
    int has = map_has(self, key);
    return has < 0 ? NULL : PyBool_FromLong(has);
}

static PyObject *map_item(PyObject *self, PyObject *key)
{
    size_t hash;
    Entry **place = find_key((Map *)self, key, &hash);
    if (place == NULL)
        return NULL;
    return *place == NULL ? missing(key) : Py_NewRef((*place)->value);
}

static int map_assign(PyObject *self, PyObject *key, PyObject *value)
{
    if (value != NULL)
        return put((Map *)self, key, value);
    size_t hash;
    Entry **place = find_key((Map *)self, key, &hash);
    if (place == NULL)
        return -1;
    if (*place == NULL) {
        missing(key);
        return -1;
    }
    PyObject *own, *own_value;
    take((Map *)self, place, &own, &own_value);
    Py_DECREF(own);
    Py_DECREF(own_value);
    return 0;
}

static int takes(const char *name, Py_ssize_t num_args, Py_ssize_t least, Py_ssize_t most)
{
    if (least <= num_args && num_args <= most)
        return 1;
    PyErr_Format(PyExc_TypeError, "%s takes %zd to %zd arguments, not %zd", name, least, most, num_args);
    return 0;
}

static PyObject *map_get(PyObject *self, PyObject *const *args, Py_ssize_t num_args)
{
    size_t hash;
    if (!takes("get", num_args, 1, 2))
        return NULL;
    Entry **place = find_key((Map *)self, args[0], &hash);
    if (place == NULL)
        return NULL;
    if (*place != NULL)
        return Py_NewRef((*place)->value);
    return Py_NewRef(num_args == 2 ? args[1] : Py_None);
}

static PyObject *map_pop(PyObject *self, PyObject *const *args, Py_ssize_t num_args)
{
    size_t hash;
    if (!takes("pop", num_args, 1, 2))
        return NULL;
    Entry **place = find_key((Map *)self, args[0], &hash);
    if (place == NULL)
        return NULL;
    if (*place == NULL)
        return num_args == 2 ? Py_NewRef(args[1]) : missing(args[0]);
    PyObject *key, *value;
    take((Map *)self, place, &key, &value);
    Py_DECREF(key);
    return value;
}

/* The argument `last`, which may be given by name; 1 without it, -1 with an exception. args: at the place of it. */
static int last_of(PyObject *const *args, Py_ssize_t num_args, PyObject *names)
{
    Py_ssize_t num_names = names == NULL ? 0 : PyTuple_GET_SIZE(names);
    if (num_args + num_names > 1) {
        PyErr_SetString(PyExc_TypeError, "too many arguments");
        return -1;
    }
    if (num_names && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, 0), "last") != 0) {
        PyErr_Format(PyExc_TypeError, "no argument is named %R", PyTuple_GET_ITEM(names, 0));
        return -1;
    }
    return num_args + num_names ? PyObject_IsTrue(args[0]) : 1;
}

static PyObject *map_move_to_end(PyObject *self, PyObject *const *args, Py_ssize_t num_args, PyObject *names)
{
    Map *map = (Map *)self;
    size_t hash;
    if (!takes("move_to_end", num_args, 1, 2))
        return NULL;
    int last = last_of(args + 1, num_args - 1, names);
    if (last < 0)
        return NULL;
    Entry **place = find_key(map, args[0], &hash);
    if (place == NULL)
        return NULL;
    Entry *entry = *place;
    if (entry == NULL)
        return missing(args[0]);
    if (entry != (last ? map->newest : map->oldest)) {
        unlink_entry(map, entry);
        if (last)
            link_last(map, entry);
        else
            link_first(map, entry);
        map->version++;
    }
    Py_RETURN_NONE;
}

static PyObject *map_popitem(PyObject *self, PyObject *const *args, Py_ssize_t num_args, PyObject *names)
{
    Map *map = (Map *)self;
    int last = last_of(args, num_args, names);
    if (last < 0)
        return NULL;
    PyObject *pair = PyTuple_New(2); /* first: it may collect garbage, and so run code that changes the map */
    if (pair == NULL)
        return NULL;
    Entry *entry = last ? map->newest : map->oldest;
    if (entry == NULL) {
        Py_DECREF(pair);
        PyErr_SetString(PyExc_KeyError, "the map is empty");
        return NULL;
    }
    Entry **place = bucket_of(map, entry->hash);
    while (*place != entry)
        place = &(*place)->chain;
    PyObject *key, *value;
    take(map, place, &key, &value);
    PyTuple_SET_ITEM(pair, 0, key);
    PyTuple_SET_ITEM(pair, 1, value);
    return pair;
}

static PyObject *map_clear(PyObject *self, PyObject *unused)
{
    (void)unused;
    clear_map((Map *)self);
    Py_RETURN_NONE;
}

static int update_from_dict(Map *map, PyObject *dict)
{
    Py_ssize_t at = 0, size = PyDict_GET_SIZE(dict);
    PyObject *key, *value;
    while (PyDict_Next(dict, &at, &key, &value)) {
        Py_INCREF(key);
        Py_INCREF(value);
        int failed = put(map, key, value);
        Py_DECREF(key);
        Py_DECREF(value);
        if (failed < 0)
            return -1;
        if (PyDict_GET_SIZE(dict) != size) {
            PyErr_SetString(PyExc_RuntimeError, "dictionary changed size during update");
            return -1;
        }
    }
    return 0;
}

static int update_from_pairs(Map *map, PyObject *pairs)
{
    PyObject *iterator = PyObject_GetIter(pairs), *pair;
    if (iterator == NULL)
        return -1;
    while ((pair = PyIter_Next(iterator)) != NULL) {
        int failed = -1;
        if (PyTuple_Check(pair) && PyTuple_GET_SIZE(pair) == 2)
            failed = put(map, PyTuple_GET_ITEM(pair, 0), PyTuple_GET_ITEM(pair, 1));
        else
            PyErr_Format(PyExc_TypeError, "update takes a dict, a map or pairs, not %R", pair);
        Py_DECREF(pair);
        if (failed < 0)
            break;
    }
    Py_DECREF(iterator);
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *map_iter(PyObject *self)
{
    return new_walk(self, KEYS, 0);
}

static PyObject *map_reversed(PyObject *self, PyObject *unused)
{
    (void)unused;
    return new_walk(self, KEYS, 1);
}

static PyObject *map_items(PyObject *self, PyObject *unused)
{
    (void)unused;
    return new_walk(self, ITEMS, 0);
}

static PyObject *map_values(PyObject *self, PyObject *unused)
{
    (void)unused;
    return new_walk(self, VALUES, 0);
}

static PyObject *map_update(PyObject *self, PyObject *other)
{
    int failed;
    if (PyDict_CheckExact(other)) {
        failed = update_from_dict((Map *)self, other);
    } else if (Py_IS_TYPE(other, Py_TYPE(self))) {
        PyObject *items = new_walk(other, ITEMS, 0);
        failed = items == NULL ? -1 : update_from_pairs((Map *)self, items);
        Py_XDECREF(items);
    } else {
        failed = update_from_pairs((Map *)self, other);
    }
    if (failed < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef MAP_METHODS[] = {
    {"__contains__", map_contains, METH_O | METH_COEXIST, NULL},
    {"__getitem__", map_item, METH_O | METH_COEXIST, NULL},
    {"__reversed__", map_reversed, METH_NOARGS, NULL},
    {"get", (PyCFunction)(void (*)(void))map_get, METH_FASTCALL, "The value of a key, or a default."},
    {"pop", (PyCFunction)(void (*)(void))map_pop, METH_FASTCALL, "Remove a key and return its value, or a default."},
    {"move_to_end", (PyCFunction)(void (*)(void))map_move_to_end, METH_FASTCALL | METH_KEYWORDS,
     "Make a key the newest, or with last=False the oldest."},
    {"popitem", (PyCFunction)(void (*)(void))map_popitem, METH_FASTCALL | METH_KEYWORDS,
     "Remove and return the newest pair, or with last=False the oldest."},
    {"clear", map_clear, METH_NOARGS, "Remove all."},
    {"update", map_update, METH_O, "Put in what a dict, a map or pairs have."},
    {"items", map_items, METH_NOARGS, "An iterator over pairs."},
    {"values", map_values, METH_NOARGS, "An iterator over values."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot MAP_SLOTS[] = {
    {Py_tp_doc, "A map in the order of insertion that never copies itself."},
    {Py_tp_new, map_new},
    {Py_tp_dealloc, map_dealloc},
    {Py_tp_iter, map_iter},
    {Py_tp_methods, MAP_METHODS},
    {Py_tp_hash, PyObject_HashNotImplemented},
    {Py_mp_length, map_length},
    {Py_mp_subscript, map_item},
    {Py_mp_ass_subscript, map_assign},
    {Py_sq_contains, map_has},
    {0, NULL},
};

static PyType_Spec MAP_SPEC = {
    .name = "radix._ordered.OrderedMap",
    .basicsize = sizeof(Map),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = MAP_SLOTS,
};

/* ---- the module ---- */

static int execute(PyObject *module)
{
    State *state = PyModule_GetState(module);
    state->map = (PyTypeObject *)PyType_FromModuleAndSpec(module, &MAP_SPEC, NULL);
    state->walk = (PyTypeObject *)PyType_FromModuleAndSpec(module, &WALK_SPEC, NULL);
    if (state->map == NULL || state->walk == NULL)
        return -1;
    return PyModule_AddType(module, state->map);
}

static int traverse(PyObject *module, visitproc visit, void *arg)
{
    State *state = PyModule_GetState(module);
    Py_VISIT(state->map);
    Py_VISIT(state->walk);
    return 0;
}

static int clear(PyObject *module)
{
    State *state = PyModule_GetState(module);
    Py_CLEAR(state->map);
    Py_CLEAR(state->walk);
    return 0;
}

static void free_module(void *module)
{
    clear(module);
}

static PyModuleDef_Slot SLOTS[] = {
    {Py_mod_exec, execute},
    {0, NULL},
};

static struct PyModuleDef MODULE = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "radix._ordered",
    .m_doc = "A map in the order of insertion that never copies itself.",
    .m_size = sizeof(State),
    .m_slots = SLOTS,
    .m_traverse = traverse,
    .m_clear = clear,
    .m_free = free_module,
};

PyMODINIT_FUNC PyInit__ordered(void)
{
    return PyModuleDef_Init(&MODULE);
}
