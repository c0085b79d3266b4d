# The part of TensorFlow's stable C API that is used here, as a table of function pointers: no
# TensorFlow header at build time, no TensorFlow symbol at link time, one binary for every release.

cdef extern from *:
    """
    typedef struct TF_Status TF_Status;
    typedef struct TF_Tensor TF_Tensor;
    typedef struct TF_OpDefinitionBuilder TF_OpDefinitionBuilder;
    typedef struct TF_ShapeHandle TF_ShapeHandle;
    typedef struct TF_ShapeInferenceContext TF_ShapeInferenceContext;
    typedef struct TF_KernelBuilder TF_KernelBuilder;
    typedef struct TF_OpKernelConstruction TF_OpKernelConstruction;
    typedef struct TF_OpKernelContext TF_OpKernelContext;
    typedef struct { size_t struct_size; unsigned char on_host; } TF_AllocatorAttributes;
    """
    ctypedef struct TF_Status
    ctypedef struct TF_Tensor
    ctypedef struct TF_OpDefinitionBuilder
    ctypedef struct TF_ShapeHandle
    ctypedef struct TF_ShapeInferenceContext
    ctypedef struct TF_KernelBuilder
    ctypedef struct TF_OpKernelConstruction
    ctypedef struct TF_OpKernelContext
    ctypedef struct TF_AllocatorAttributes:
        size_t struct_size
        unsigned char on_host

cdef extern from "<dlfcn.h>" nogil:
    void* dlopen(const char*, int) noexcept
    void* dlsym(void*, const char*) noexcept
    enum: RTLD_LAZY
    enum: RTLD_NOLOAD

# Values of TensorFlow's own enumerations.
cdef enum:
    TF_FLOAT = 1
    TF_DOUBLE = 2
    TF_INT32 = 3
    TF_UINT8 = 4
    TF_INT16 = 5
    TF_INT64 = 9
cdef enum:
    TF_OK = 0
    TF_INVALID_ARGUMENT = 3

ctypedef void (*shape_fn)(TF_ShapeInferenceContext*, TF_Status*) noexcept nogil
ctypedef void* (*create_fn)(TF_OpKernelConstruction*) noexcept nogil
ctypedef void (*compute_fn)(void*, TF_OpKernelContext*) noexcept nogil
ctypedef void (*delete_fn)(void*) noexcept nogil
ctypedef void (*deallocate_fn)(void*, size_t, void*) noexcept nogil

# Member names are the functions' names without "TF_"; `api_names` lists them in the same order.
cdef struct TFApi:
    TF_Status* (*NewStatus)() noexcept nogil
    void (*DeleteStatus)(TF_Status*) noexcept nogil
    void (*SetStatus)(TF_Status*, int, const char*) noexcept nogil
    int (*GetCode)(const TF_Status*) noexcept nogil
    TF_OpDefinitionBuilder* (*NewOpDefinitionBuilder)(const char*) noexcept nogil
    void (*RegisterOpDefinition)(TF_OpDefinitionBuilder*, TF_Status*) noexcept nogil
    void (*OpDefinitionBuilderAddAttr)(TF_OpDefinitionBuilder*, const char*) noexcept nogil
    void (*OpDefinitionBuilderAddInput)(TF_OpDefinitionBuilder*, const char*) noexcept nogil
    void (*OpDefinitionBuilderAddOutput)(TF_OpDefinitionBuilder*, const char*) noexcept nogil
    void (*OpDefinitionBuilderSetShapeInferenceFunction)(
        TF_OpDefinitionBuilder*, shape_fn) noexcept nogil
    TF_ShapeHandle* (*NewShapeHandle)() noexcept nogil
    void (*DeleteShapeHandle)(TF_ShapeHandle*) noexcept nogil
    void (*ShapeInferenceContextGetInput)(
        TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*) noexcept nogil
    void (*ShapeInferenceContextSetOutput)(
        TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*) noexcept nogil
    void (*ShapeInferenceContextSetUnknownShape)(
        TF_ShapeInferenceContext*, TF_Status*) noexcept nogil
    int64_t (*ShapeInferenceContextRank)(
        TF_ShapeInferenceContext*, TF_ShapeHandle*) noexcept nogil
    int (*ShapeInferenceContextRankKnown)(
        TF_ShapeInferenceContext*, TF_ShapeHandle*) noexcept nogil
    void (*ShapeInferenceContextWithRank)(
        TF_ShapeInferenceContext*, TF_ShapeHandle*, int64_t, TF_ShapeHandle*,
        TF_Status*) noexcept nogil
    void (*ShapeInferenceContextSubshape)(
        TF_ShapeInferenceContext*, TF_ShapeHandle*, int64_t, int64_t, TF_ShapeHandle*,
        TF_Status*) noexcept nogil
    void (*ShapeInferenceContextConcatenateShapes)(
        TF_ShapeInferenceContext*, TF_ShapeHandle*, TF_ShapeHandle*, TF_ShapeHandle*,
        TF_Status*) noexcept nogil
    TF_KernelBuilder* (*NewKernelBuilder)(
        const char*, const char*, create_fn, compute_fn, delete_fn) noexcept nogil
    void (*RegisterKernelBuilder)(const char*, TF_KernelBuilder*, TF_Status*) noexcept nogil
    int (*NumInputs)(TF_OpKernelContext*) noexcept nogil
    void (*GetInput)(TF_OpKernelContext*, int, TF_Tensor**, TF_Status*) noexcept nogil
    TF_Tensor* (*AllocateOutput)(
        TF_OpKernelContext*, int, int, const int64_t*, int, size_t, TF_Status*) noexcept nogil
    TF_Tensor* (*NewTensor)(
        int, const int64_t*, int, void*, size_t, deallocate_fn, void*) noexcept nogil
    void (*SetOutput)(TF_OpKernelContext*, int, const TF_Tensor*, TF_Status*) noexcept nogil
    TF_Tensor* (*ForwardInputOrAllocateOutput)(
        TF_OpKernelContext*, const int*, int, int, const int64_t*, int, int*,
        TF_Status*) noexcept nogil
    TF_Tensor* (*AllocateTemp)(
        TF_OpKernelContext*, int, const int64_t*, int, TF_AllocatorAttributes*,
        TF_Status*) noexcept nogil
    void (*OpKernelContext_Failure)(TF_OpKernelContext*, TF_Status*) noexcept nogil
    void (*OpKernelConstruction_Failure)(TF_OpKernelConstruction*, TF_Status*) noexcept nogil
    void (*OpKernelConstruction_GetAttrSize)(
        TF_OpKernelConstruction*, const char*, int32_t*, int32_t*, TF_Status*) noexcept nogil
    void (*OpKernelConstruction_GetAttrBool)(
        TF_OpKernelConstruction*, const char*, unsigned char*, TF_Status*) noexcept nogil
    void (*OpKernelConstruction_GetAttrFloat)(
        TF_OpKernelConstruction*, const char*, float*, TF_Status*) noexcept nogil
    void (*OpKernelConstruction_GetAttrInt64)(
        TF_OpKernelConstruction*, const char*, int64_t*, TF_Status*) noexcept nogil
    void (*OpKernelConstruction_GetAttrInt64List)(
        TF_OpKernelConstruction*, const char*, int64_t*, int, TF_Status*) noexcept nogil
    void (*OpKernelConstruction_GetAttrString)(
        TF_OpKernelConstruction*, const char*, char*, size_t, TF_Status*) noexcept nogil
    void (*DeleteTensor)(TF_Tensor*) noexcept nogil
    int (*NumDims)(const TF_Tensor*) noexcept nogil
    int64_t (*Dim)(const TF_Tensor*, int) noexcept nogil
    void* (*TensorData)(const TF_Tensor*) noexcept nogil
    int (*TensorType)(const TF_Tensor*) noexcept nogil

cdef extern from *:
    """
    static const char *const dfp_api_names[] = {
        "TF_NewStatus", "TF_DeleteStatus", "TF_SetStatus", "TF_GetCode",
        "TF_NewOpDefinitionBuilder", "TF_RegisterOpDefinition", "TF_OpDefinitionBuilderAddAttr",
        "TF_OpDefinitionBuilderAddInput", "TF_OpDefinitionBuilderAddOutput",
        "TF_OpDefinitionBuilderSetShapeInferenceFunction",
        "TF_NewShapeHandle", "TF_DeleteShapeHandle",
        "TF_ShapeInferenceContextGetInput",
        "TF_ShapeInferenceContextSetOutput", "TF_ShapeInferenceContextSetUnknownShape",
        "TF_ShapeInferenceContextRank", "TF_ShapeInferenceContextRankKnown",
        "TF_ShapeInferenceContextWithRank",
        "TF_ShapeInferenceContextSubshape", "TF_ShapeInferenceContextConcatenateShapes",

        "TF_NewKernelBuilder", "TF_RegisterKernelBuilder", "TF_NumInputs", "TF_GetInput",
        "TF_AllocateOutput", "TF_NewTensor", "TF_SetOutput",
        "TF_ForwardInputOrAllocateOutput", "TF_AllocateTemp",
        "TF_OpKernelContext_Failure",
        "TF_OpKernelConstruction_Failure", "TF_OpKernelConstruction_GetAttrSize",
        "TF_OpKernelConstruction_GetAttrBool", "TF_OpKernelConstruction_GetAttrFloat",
        "TF_OpKernelConstruction_GetAttrInt64",
        "TF_OpKernelConstruction_GetAttrInt64List", "TF_OpKernelConstruction_GetAttrString",
        "TF_DeleteTensor", "TF_NumDims", "TF_Dim", "TF_TensorData", "TF_TensorType",
    };
    enum { DFP_API_SIZE = sizeof dfp_api_names / sizeof dfp_api_names[0] };
    """
    const char** dfp_api_names
    const int DFP_API_SIZE

# Zero until load_api runs; without an initialiser, because the module's own initialisation comes
# after the constructor and would reset it.
cdef TFApi tf


cdef bint load_api() noexcept nogil:
    """Fills the table from the TensorFlow in this process; False if it has not got it all."""
    cdef void* lib = dlopen("libtensorflow_framework.so.2", RTLD_LAZY | RTLD_NOLOAD)
    cdef int i
    if lib == NULL or DFP_API_SIZE * sizeof(void*) != sizeof(TFApi):
        return False
    for i in range(DFP_API_SIZE):
        (<void**>&tf)[i] = dlsym(lib, dfp_api_names[i])
        if (<void**>&tf)[i] == NULL:
            return False
    return True
