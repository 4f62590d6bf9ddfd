// Functions that Python calls by keyword, every argument by its name: of a dozen addresses no two can be swapped
// unseen. pybind11 offers that too, but looks each name up in a dictionary, which for a dozen takes a microsecond of
// the twelve of a whole call. Here a call's names are compared by address with the expected ones, in order; conversions
// are CPython's, and pybind11's for classes and tuples.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <type_traits>

namespace m4k {
namespace py = pybind11;

template <size_t N>
struct Name {  // a string literal as a template argument
    char text[N];
    constexpr Name(const char (&literal)[N]) { std::copy_n(literal, N, text); }  // implicit, so that a literal is one
};

// The names of one function and its arguments, and how a call's arguments are put into their order.
struct ArgumentNames {
    const char* function;
    PyObject* const* names;  // interned
    size_t count;

    // ordered (count,) of a call in CPython's form; false with a Python exception where a name is missing or unknown.
    bool order(PyObject* const* args, Py_ssize_t positional, PyObject* given, PyObject** ordered) const;
    // Sets the exception for an argument that has the wrong type or does not fit its type; returns null.
    PyObject* refuse(size_t argument, PyObject* value) const;
};

template <typename T>
struct Argument {  // what pybind11 converts
    py::detail::make_caster<T> caster;
    bool load(PyObject* object) { return caster.load(object, true); }
    decltype(auto) get() { return py::detail::cast_op<const T&>(caster); }  // a tuple comes by value
};

template <typename T>
    requires std::is_arithmetic_v<T>
struct Argument<T> {
    T value;
    bool load(PyObject* object) {
        if constexpr (std::is_same_v<T, bool>) {
            value = object == Py_True;
            return value || object == Py_False;
        } else if constexpr (std::is_floating_point_v<T>) {
            value = static_cast<T>(PyFloat_AsDouble(object));
            return value != T(-1) || !PyErr_Occurred();
        } else if constexpr (std::is_unsigned_v<T>) {
            const unsigned long long wide = PyLong_AsUnsignedLongLong(object);
            value = static_cast<T>(wide);
            return value == wide && (wide != ~0ull || !PyErr_Occurred());
        } else {
            const long long wide = PyLong_AsLongLong(object);
            value = static_cast<T>(wide);
            return value == wide && (wide != -1 || !PyErr_Occurred());
        }
    }
    T get() const { return value; }
};

class WithoutGil {
  public:
    WithoutGil() : state_(PyEval_SaveThread()) {}
    ~WithoutGil() { PyEval_RestoreThread(state_); }
    WithoutGil(const WithoutGil&) = delete;
    WithoutGil& operator=(const WithoutGil&) = delete;

  private:
    PyThreadState* state_;
};

template <auto Function, Name... names>
class ByName {
  public:
    static void define(py::module_& m, const char* function) {
        size_t i = 0;
        ((names_[i++] = PyUnicode_InternFromString(names.text)), ...);
        method_ = {function, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)),
                   METH_FASTCALL | METH_KEYWORDS, nullptr};
        m.attr(function) = py::reinterpret_steal<py::object>(PyCFunction_New(&method_, nullptr));
    }

  private:
    static constexpr size_t kCount = sizeof...(names);
    static inline PyObject* names_[kCount];
    static inline PyMethodDef method_;

    static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t positional, PyObject* given) {
        const ArgumentNames expected{method_.ml_name, names_, kCount};
        PyObject* ordered[kCount];
        if (!expected.order(args, positional, given, ordered)) return nullptr;
        try {
            return run(Function, expected, ordered, std::make_index_sequence<kCount>{});
        } catch (py::error_already_set& error) {
            error.restore();
        } catch (const std::invalid_argument& error) {
            PyErr_SetString(PyExc_ValueError, error.what());
        } catch (const std::exception& error) {
            PyErr_SetString(PyExc_RuntimeError, error.what());
        }
        return nullptr;
    }

    template <typename R, typename... Args, size_t... I>
    static PyObject* run(R (*function)(Args...), const ArgumentNames& expected, PyObject** ordered,
                         std::index_sequence<I...>) {
        static_assert(sizeof...(Args) == kCount, "one name an argument");
        std::tuple<Argument<std::decay_t<Args>>...> arguments;
        size_t loaded = 0;
        if (!((std::get<I>(arguments).load(ordered[I]) && ++loaded) && ...)) {
            return expected.refuse(loaded, ordered[loaded]);
        }
        if constexpr (std::is_void_v<R>) {
            {
                const WithoutGil released;
                function(std::get<I>(arguments).get()...);
            }
            Py_RETURN_NONE;
        } else {
            R result = [&] {
                const WithoutGil released;
                return function(std::get<I>(arguments).get()...);
            }();
            return py::cast(std::move(result)).release().ptr();
        }
    }
};

// Defines `function` of the module: it runs Function without the GIL, its arguments being named in their order.
template <auto Function, Name... names>
void def_by_name(py::module_& m, const char* function) {
    ByName<Function, names...>::define(m, function);
}

}  // namespace m4k
