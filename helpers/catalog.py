"""The mistakes of the course: what one sees, why it happens, what proves it, what to change."""

from dataclasses import dataclass

FAMILIES = {
    "ingestion": "02_ingestion",
    "transformation": "03_transformation",
    "resources": "04_resources",
    "output": "05_output",
}


@dataclass(frozen=True)
class Mistake:
    """One mistake. The lesson that measures it has a heading that starts with its id."""

    id: str
    family: str
    title: str  # what the code does
    symptom: str  # what somebody sees who has it
    cause: str  # why it costs
    evidence: str  # the counter that proves it
    knob: str  # what to change
    no_help: str  # when the change does not help

    @property
    def lesson(self) -> str:
        return FAMILIES[self.family]


_ALL = [
    Mistake(
        "T1",
        "transformation",
        "Per-row Python for numeric work",
        "A stage without a model keeps the cores busy; a profile shows Python, not NumPy",
        "Each number passes through the interpreter, and each row through a call of its own",
        "calls of the function: one per image against one per batch",
        "`map_batches` and NumPy on whole arrays",
        "NumPy inside a per-row `map` is nearly as fast when a row is a whole image",
    ),
    Mistake(
        "T2",
        "transformation",
        "The model built inside the function",
        "Throughput rises steeply with the batch size; weights are loaded again and again",
        "A function has no memory: each call builds and loads the model anew",
        "model constructions: one per batch against one per actor",
        "A class whose `__init__` builds the model, with `compute=ActorPoolStrategy(...)`",
        "Few, large batches hide it: the cost is per batch, not per image",
    ),
    Mistake(
        "T3",
        "transformation",
        "A batch of one, or a batch as large as the block",
        "A GPU at a few percent (one), or workers that run out of memory (whole block)",
        "Each forward pass has a fixed cost; each image in a batch has its memory",
        "batch-size histogram at the model",
        "`batch_size=` a number that the device likes; never the default with a model",
        "On a CPU the fixed cost is small: larger batches than a few images gain little or nothing",
    ),
    Mistake(
        "T4",
        "transformation",
        "float32 tensors through the object store",
        "The object store fills up, spilling starts, the network is busy on a cluster",
        "Normalized float32 pixels take four bytes where the image has one",
        "bytes leaving the preprocessing operator",
        "Ship uint8, normalize in the model's actor",
        "Fused into one operator nothing is shipped; with few small images time does not change",
    ),
    Mistake(
        "T5",
        "transformation",
        "Pixels carried through inference",
        "The model's operator puts out far more bytes than labels can need",
        "The batch is returned with one more column, and all its old columns",
        "bytes leaving the model operator",
        "Return only the columns that somebody downstream reads",
        "When the next stage does need the pixels; then count what it costs",
    ),
    Mistake(
        "T6",
        "transformation",
        "Fusion broken by accident",
        "`explain()` shows one operator more than expected; bytes between them are the raw data",
        "Different resources or pools on neighboring maps keep Ray Data from fusing them",
        "operators in the plan, bytes between them",
        "The same `num_cpus` (or none) on maps that belong together",
        "When the stages must scale apart, a split is right: then it is a decision",
    ),
    Mistake(
        "T7",
        "transformation",
        "Fusion by accident: preprocessing inside the model actor",
        "The model actor is busy, other cores are idle; it shows on CPU-only clusters only",
        "With equal resources Ray Data fuses map and model: one actor decodes and infers in turn",
        "operators in the plan, tasks that decode",
        "A `num_cpus` for the actor that differs from the map's",
        "When the cores are saturated anyway, overlap has nothing to win",
    ),
    Mistake(
        "T8",
        "transformation",
        "pandas batches for tensors",
        "A stage spends its time before the function is called; memory is a multiple of the batch",
        "Tensor columns become objects, one per row; stacking them copies every byte",
        "bytes copied to get one array out of the batch",
        '`batch_format="numpy"` (the default): a view of the block, no copy',
        "For tables of scalars pandas is fine",
    ),
    Mistake(
        "T9",
        "transformation",
        "Array to PIL to tensor and back",
        "Preprocessing is slower than decoding alone explains",
        "Each conversion copies the image; two of them undo each other",
        "conversions per image",
        "Decode once, resize while it is a PIL image, then stay with arrays",
        "Next to decoding, one more copy of a 224-pixel crop is small",
    ),
    Mistake(
        "T10",
        "transformation",
        "A big object captured in a closure",
        "Each stage starts late; a warning about a large function; memory grows with the workers",
        "The function travels to the workers with all that it refers to, for each task anew",
        "bytes of the function, bytes shipped to tasks",
        "Build the object in `__init__`, or pass an object reference",
        "Small objects: some kilobytes in a closure cost nothing",
    ),
    Mistake(
        "T11",
        "transformation",
        "fp32, NCHW, autograd on",
        "The model alone is slower than the device should allow; memory grows during the pass",
        "Autograd keeps activations; the layout and the precision do not suit the kernels",
        "forward passes with autograd, forward passes in channels-last",
        "`torch.inference_mode()`, channels-last, bf16 where the device has it",
        "bf16 without hardware for it is slower than fp32",
    ),
    Mistake(
        "T12",
        "transformation",
        'Preprocessing that is wrong and "works"',
        "No error, plausible labels, accuracy below the model card",
        "The model was trained with one preprocessing and gets another",
        "images whose logits differ from the reference",
        "The weights' own transforms, checked against the reference once per pipeline",
        "Never: a fast wrong answer is no answer",
    ),
]

MISTAKES: dict[str, Mistake] = {mistake.id: mistake for mistake in _ALL}


@dataclass(frozen=True)
class Label:
    """A mistake that the published template labels, and where it went in this course."""

    name: str  # as numbered there: the reader's, the class's, then the rest
    about: str
    ids: tuple[str, ...]  # the mistakes that it is; none where it is not one
    reason: str = ""  # why it is none, or what is different about it


# Anyscale's "Ray Data Batch Inference Optimization Template", August 2025, Apache-2.0:
# github.com/anyscale/templates, commit 57f9f29d. It labels 29 mistakes; some are labeled twice.
ORIGINAL_LABELS = (
    Label("reader 1", "no streaming, block sizes not set", ("I7", "I8")),
    Label(
        "reader 2",
        "`override_num_blocks` not set",
        (),
        "Ray Data's own choice of blocks is right in most cases; setting it badly is I6",
    ),
    Label("reader 3", "the whole dataset loaded", ("I8",), "Ray Data streams unless told not to"),
    Label("class 1", "model not kept between calls", ("T2",)),
    Label("class 2", "model used as it comes, not optimized", ("T11",)),
    Label("class 3", "transforms made anew in each call", ("T2",)),
    Label("class 4", "no batch size for the device", ("T3",)),
    Label(
        "class 5",
        "no cleanup",
        (),
        "A matter of running in production (P5), which no lesson measures yet",
    ),
    Label("class 6", "conversions and memory in a batch", ("T8", "T9")),
    Label("class 7", "one image at a time", ("T3",)),
    Label("class 8", "array to PIL to tensor", ("T9",)),
    Label("class 9", "no forward pass for a whole batch", ("T3",)),
    Label("class 10", "results put together image by image", ("T1",)),
    Label("class 11", "results aggregated in Python", ("T1",)),
    Label("class 12", "errors only logged, columns of unequal length", ("I11",)),
    Label("13", "one configuration whatever the resources", ("R11",)),
    Label("14", "too few workers with GPUs", ("R1",)),
    Label("15", "too few workers on CPUs", ("R1",)),
    Label("16", "block size not configured", ("I7",)),
    Label("17", "`map` where `map_batches` belongs", ("T1",)),
    Label("18", "too few workers", ("R1",)),
    Label("19", "GPU not asked for", ("R11",)),
    Label("20", "batch size not tuned", ("T3",)),
    Label("21", "no `num_gpus` although there are GPUs", ("R11",)),
    Label("22", "batch size not tuned, again", ("T3",)),
    Label(
        "23",
        "no progress to watch",
        (),
        "A matter of running in production (P4); how to watch a run is in the lesson on measuring",
    ),
    Label("24", "`take_all` brings everything to the driver", ("O3",)),
    Label("25", "written after `take_all`, so the model runs twice", ("I9",)),
    Label("26", "no repartition before the write", ("O1",)),
)
