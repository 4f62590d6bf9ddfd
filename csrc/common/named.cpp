#include "common/named.h"

#include <string>

namespace m4k {
namespace {

bool complain(const ArgumentNames& expected) {
    std::string list;
    for (size_t i = 0; i < expected.count; ++i)
        list += (i ? ", " : "") + py::str(expected.names[i]).cast<std::string>();
    PyErr_Format(PyExc_TypeError, "%s() takes these arguments, each by its name: %s", expected.function, list.c_str());
    return false;
}

}  // namespace

bool ArgumentNames::order(PyObject* const* args, Py_ssize_t positional, PyObject* given, PyObject** ordered) const {
    if (positional != 0 || given == nullptr || PyTuple_GET_SIZE(given) != static_cast<Py_ssize_t>(count)) {
        return complain(*this);
    }
    for (size_t i = 0; i < count; ++i) {
        PyObject* name = PyTuple_GET_ITEM(given, i);
        size_t place = i;
        if (name != names[i]) {
            place = 0;
            while (place < count && name != names[place] && PyUnicode_Compare(name, names[place]) != 0) ++place;
            if (place == count) return complain(*this);
        }
        ordered[place] = args[i];
    }
    return true;
}

PyObject* ArgumentNames::refuse(size_t argument, PyObject* value) const {
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "%s(): %U does not fit its type, got %R", function, names[argument], value);
    return nullptr;
}

}  // namespace m4k
