"""What the doctor can see in the code of a user's function or class, without running it.

Only what the text proves is reported. Where the text is missing (built in C, typed into a plain
interpreter) there are no facts, and rules that need them stay silent.
"""

import ast
import contextlib
import dis
import functools
import inspect
import linecache
import os
import re
import sys
import sysconfig
from dataclasses import dataclass, field

MODEL_NAME = re.compile(
    r"model|predict|infer|classif|embed|detect|segment|caption|resnet|vit$|bert|encoder|scorer"
    r"|labeler|tagger|net$",
    re.IGNORECASE,
)
_BUILDER = re.compile(
    r"^_?(load|build|create|make|get|init|construct|fetch|restore)_?\w*"
    r"(model|net|network|backbone|weights|classifier|encoder|embedder|detector|predictor|pipeline)"
    r"s?\d*$",
    re.IGNORECASE,
)
_ARCHITECTURE = re.compile(
    r"^(resnet|resnext|vit|swin|efficientnet|mobilenet|convnext|densenet|vgg|bert|gpt|yolo)\w*$"
)
_MODEL_CLASS = re.compile(
    r"^[A-Z]\w*(Model|Net|Network|Classifier|Encoder|Detector|Predictor|Embedder|ResNet\d*)\d*$"
)
_LOADERS = {
    "clip.load",
    "fasttext.load_model",
    "joblib.load",
    "keras.models.load_model",
    "onnxruntime.InferenceSession",
    "open_clip.create_model",
    "open_clip.create_model_and_transforms",
    "sentence_transformers.SentenceTransformer",
    "spacy.load",
    "tensorflow.keras.models.load_model",
    "tensorflow.saved_model.load",
    "timm.create_model",
    "torch.hub.load",
    "torch.jit.load",
    "torch.load",
    "transformers.pipeline",
    "ultralytics.YOLO",
    "whisper.load_model",
    "xgboost.Booster",
    "lightgbm.Booster",
}
_RESIZE = {
    "CenterCrop", "RandomResizedCrop", "Resize", "center_crop", "interpolate", "resize",
    "thumbnail",
}  # fmt: skip
_RESIZING_PRESETS = {"ImageClassification", "SemanticSegmentation"}  # of `weights.transforms()`
_DECODERS = {
    "PIL.Image.open",
    "cv2.imdecode",
    "cv2.imread",
    "torchvision.io.decode_image",
    "torchvision.io.decode_jpeg",
    "torchvision.io.read_image",
    "imageio.imread",
    "skimage.io.imread",
    "librosa.load",
}
_IN_COMPARISONS = (
    ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.Compare, ast.BinOp, ast.Subscript,
    ast.Constant, ast.Name, ast.Load, ast.List, ast.Tuple, ast.Set, ast.operator, ast.cmpop,
    ast.unaryop,
)  # fmt: skip
# What says the same as an operator would, in pandas, NumPy and pyarrow.compute.
_COMPARING = {
    "and_", "array", "between", "eq", "equal", "ge", "greater", "greater_equal", "gt", "invert",
    "is_in", "isin", "le", "less", "less_equal", "logical_and", "logical_not", "logical_or", "lt",
    "ne", "not_equal", "or_", "scalar",
}  # fmt: skip
_SCRIPT = ("__main__", "__mp_main__")  # modules that no worker can import
_TRANSFORMS = {"ToPILImage", "ToTensor", "PILToTensor"}
# What leaves no autograd graph. In `__init__`, only what lasts when that is over.
_GRAD_OFF = re.compile(
    r"set_grad_enabled|requires_grad_?\(\s*False|requires_grad\s*=\s*False|__enter__"
    r"|(inference_mode|no_grad)(?!\(\):)"
)
_NO_GRAD = re.compile(rf"inference_mode|no_grad|{_GRAD_OFF.pattern}")
_BATCH_LIBRARIES = ("torch", "tensorflow", "jax", "cupy", "onnxruntime", "transformers", "vllm")


@dataclass
class Call:
    name: str  # dotted, with import aliases resolved: "torchvision.models.resnet50"
    node: ast.Call
    inside: str  # the function or method that contains it
    guarded: bool  # behind "only if it is not there yet"
    kept_in: str = ""  # the module whose globals remember it then
    target: object = None  # what the name stands for, where that is known
    given: object = None  # its first argument, where that is a name of the module
    makes_model: bool = False  # a function that keeps what it makes, and makes a model


@dataclass
class Facts:
    """What stands in one user function, or in one class and what its `__call__` reaches."""

    name: str
    is_class: bool
    call_text: str = ""  # of the entry and what it calls
    init_text: str = ""  # of `__init__` and what it calls
    calls: list[Call] = field(default_factory=list)
    init_calls: list[Call] = field(default_factory=list)  # of `__init__`; not among `calls`
    strings: set[str] = field(default_factory=set)
    entry: ast.AST | None = None  # the function, lambda or `__call__` that Ray Data calls
    parameter: str | None = None  # its row or batch
    body: list[ast.AST] = field(default_factory=list)  # entry and the helpers that it calls
    cls: ast.ClassDef | None = None
    init: ast.FunctionDef | None = None
    properties: set[str] = field(default_factory=set)  # of the class, that are used

    @property
    def text(self) -> str:
        return self.call_text + "\n" + self.init_text

    @property
    def known(self) -> bool:
        return self.entry is not None

    def called(self, *names: str) -> list[Call]:
        """Calls whose dotted name is, or ends in, one of `names`."""
        return [
            c for c in self.calls if any(c.name == n or c.name.endswith("." + n) for n in names)
        ]

    @property
    def uses_accelerator_library(self) -> bool:
        everything = [c.name for c in self.calls + self.init_calls]
        if any(name.split(".")[0] in _BATCH_LIBRARIES for name in everything):
            return True
        return bool(re.search(r"\b(torch|tensorflow|jax|cupy|cuda)\b", self.text))

    @property
    def resizes(self) -> bool:
        """Whether the text resizes or crops; `weights.transforms()` of torchvision does both."""
        for call in self.calls + self.init_calls:
            last = call.name.split(".")[-1]
            # The preset's method takes no image; `self.transforms(image)` applies whatever it is.
            if last in _RESIZE or (last == "transforms" and not call.node.args):
                return True
        return False

    @property
    def crops(self) -> bool:
        """Whether the text cuts something out of an array: `image[top : top + 224, left:right]`."""
        cuts = [
            sum(isinstance(i, ast.Slice) and (i.lower or i.upper) is not None for i in index.elts)
            for body in self.body
            for node in ast.walk(body)
            if isinstance(node, ast.Subscript) and isinstance(index := node.slice, ast.Tuple)
        ]
        return max(cuts, default=0) >= 2

    @property
    def decodes(self) -> bool:
        return any(c.name in _DECODERS for c in self.calls + self.init_calls)

    @property
    def looks_like_model(self) -> bool:
        if self.is_class and (MODEL_NAME.search(self.name) or self.model_built_in_init):
            return True
        return bool(self.models_built())

    @property
    def model_built_in_init(self) -> list[str]:
        return [c.name for c in self.init_calls if _builds_model(c, self)]

    def models_built(self) -> list[str]:
        """Names of models that each call builds or loads anew."""
        return [c.name for c in self.calls if not c.guarded and _builds_model(c, self)]

    def models_forgotten(self) -> list[str]:
        """Names of models that a function keeps in a global of the script. Ray unpickles what a
        script defines for each task anew, globals and all, so the next task builds it again."""
        if self.is_class:
            return []
        return [
            call.name
            for call in self.calls
            if call.guarded and call.kept_in in _SCRIPT and _builds_model(call, self)
        ]

    # -- columns

    def columns_used(self) -> set[str] | None:
        """The columns that are read; None when the row or batch is also used as a whole."""
        if not self.known or self.parameter is None:
            return None
        used, whole = set(), False
        for node in ast.walk(self.entry):
            if isinstance(node, ast.Name) and node.id == self.parameter:
                parent = getattr(node, "parent", None)
                key = _constant_key(parent) if isinstance(parent, ast.Subscript) else None
                if key is not None and isinstance(parent.ctx, ast.Load):
                    used.add(key)
                elif isinstance(parent, ast.Attribute) and _is_get(parent):
                    used.add(parent.parent.args[0].value)
                elif not isinstance(parent, ast.arg):
                    whole = True
        return None if whole else used

    def _only_reads_columns(self) -> bool:
        """Whether the row is used as `row[...]`, and never as a whole."""
        uses = [
            getattr(node, "parent", None)
            for node in ast.walk(self.entry)
            if isinstance(node, ast.Name) and node.id == self.parameter
        ]
        reads = (isinstance(use, ast.Subscript) and isinstance(use.ctx, ast.Load) for use in uses)
        return bool(uses) and all(reads)

    def changes_column(self, column: str) -> bool:
        """Whether the code puts something else under that name."""
        for body in self.body:
            for node in ast.walk(body):
                if isinstance(node, ast.Assign | ast.AugAssign):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    for target in targets:
                        if isinstance(target, ast.Subscript) and _constant_key(target) == column:
                            return not _reads_column(node.value, column)
                if isinstance(node, ast.Dict):
                    for key, value in zip(node.keys, node.values, strict=True):
                        if isinstance(key, ast.Constant) and key.value == column:
                            return not _reads_column(value, column)
        return False

    def expressible(self) -> bool:
        """Whether a filter's function is comparisons of columns and constants, nothing else."""
        if not self.known or self.columns_used() is None:
            return False
        result = _single_return(self.entry)
        if result is None:
            return False
        settings = [  # `config.limit`, where `config` is not the row
            node for node in ast.walk(result)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id != self.parameter
        ]  # fmt: skip
        return all(isinstance(n, _IN_COMPARISONS) or n in settings for n in ast.walk(result))

    def columns_of_a_mask(self) -> set[str]:
        """The columns that a function on batches compares with constants, to return the rows for
        which that is so and nothing else: `df[df["x"] > 3]`, `table.filter(pc.equal(...))`, or
        `{k: v[mask] for k, v in batch.items()}`. Empty when it does anything else."""
        if not self.known or self.parameter is None or isinstance(self.entry, ast.Lambda):
            statements, result = [], getattr(self.entry, "body", None)
        else:
            *statements, last = [n for n in self.entry.body if not _is_docstring(n)]
            result = last.value if isinstance(last, ast.Return) else None
        named = {}
        for statement in statements:
            one = isinstance(statement, ast.Assign) and len(statement.targets) == 1
            if not one or not isinstance(statement.targets[0], ast.Name):
                return set()
            name = statement.targets[0].id
            if name in named or name == self.parameter:
                return set()  # what it stands for depends on the line
            named[name] = statement.value
        mask = _mask_of(result, self.parameter) if isinstance(result, ast.AST) else None
        columns, queue = set(), [mask] if mask is not None else []
        while queue:
            node = queue.pop()
            key = _constant_key(node)
            if key is not None and ast.unparse(node.value) == self.parameter:
                columns.add(key)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == self.parameter:
                columns.add(node.attr)  # df.x
            elif isinstance(node, ast.Name) and node.id in named:
                queue.append(named.pop(node.id))  # once: it may name itself
            elif isinstance(node, ast.Call):
                method = getattr(node.func, "attr", "")
                if method in ("column", "field") and len(node.args) == 1 and _is_text(node.args[0]):
                    columns.add(node.args[0].value)
                elif method in _COMPARING:
                    queue += [*node.args, *(k.value for k in node.keywords)]
                    if not isinstance(node.func.value, ast.Name):  # df["x"].isin(...)
                        queue.append(node.func.value)
                else:
                    return set()
            elif isinstance(node, ast.Name) and node.id == self.parameter:
                return set()
            elif isinstance(node, _IN_COMPARISONS):
                queue += ast.iter_child_nodes(node)
            else:
                return set()
        return columns

    # -- single findings

    def autograd(self, arguments: dict | None = None) -> str | None:
        """The model call that runs with autograd, when the text proves it. `arguments`: of the
        class's `__init__`, by name."""
        torch = sys.modules.get("torch")  # not there when only the workers import it
        if not self.known:
            return None
        if _NO_GRAD.search(self.call_text) or _GRAD_OFF.search(self.init_text):
            return None
        models = self._torch_models()
        models |= self._given_models(arguments or {}, torch) if torch else {}
        for call in self.calls:
            name = ast.unparse(call.node.func)
            if name in models:
                return f"`{name}(...)`, {models[name]}"
            if torch and _learns(call.target, torch):
                return f"`{name}(...)`, a {type(call.target).__name__}"
        return None

    def _torch_models(self) -> dict[str, str]:
        """What the code calls its torch models -> what makes them."""
        made = [c for c in self.init_calls + self.calls if _is_torch_model(c, self)]
        names = {name: f"made by {c.name}" for c in made if (name := _assigned(c.node))}
        return names | {
            f"self.{c.inside}": f"made by {c.name}" for c in made if c.inside in self.properties
        }

    def _given_models(self, arguments: dict, torch) -> dict[str, str]:
        """What `__init__` calls the torch models that it gets -> how they come."""
        found = {}
        for node in self.init.body if self.init is not None else []:
            if not isinstance(node, ast.Assign):
                continue
            value, how = node.value, "which is given to `__init__`"
            if isinstance(value, ast.Call) and ast.unparse(value.func) == "ray.get" and value.args:
                value, how = value.args[0], "which is `ray.get` of a reference"
            given = _given(value, arguments) if isinstance(value, ast.Name) else None
            if _learns(_referenced(given), torch):
                found |= {ast.unparse(target): how for target in node.targets}
        return found

    @property
    def calls_module(self) -> bool:
        """Whether it calls a torch model that was built outside of it."""
        torch = sys.modules.get("torch")
        return torch is not None and any(_learns(call.target, torch) for call in self.calls)

    def float64(self) -> str | None:
        """Where the model, or what goes into it, is made double precision."""
        if "torch" not in self.text:
            return None
        for call in self.calls + self.init_calls:
            last = call.name.split(".")[-1]
            arguments = [*call.node.args, *(k.value for k in call.node.keywords)]
            texts = [ast.unparse(argument) for argument in arguments]
            if last == "double" and not texts:
                found = ".double()"
            elif kinds := [t for t in texts if t in ("torch.float64", "torch.double")]:
                found = f"{last}(..., {kinds[0]})"
            else:
                continue
            if not self._behind_the_model(call):
                return found
        return None

    def _behind_the_model(self, call: Call) -> bool:
        """Whether a call works on the answers: what it makes leaves torch, or its line comes after
        the model's."""
        if call not in self.calls:
            return False
        node = call.node
        while isinstance(node.parent, ast.Attribute) and isinstance(node.parent.parent, ast.Call):
            if node.parent.attr in ("numpy", "tolist", "item"):
                return True
            node = node.parent.parent
        models = self._torch_models()
        forward = [
            (other.node.end_lineno, other.node.end_col_offset)
            for other in self.calls
            if ast.unparse(other.node.func) in models and other.inside == call.inside
        ]
        at = call.node.end_lineno, call.node.end_col_offset
        return bool(forward) and at > min(forward)

    def forward_for_each_row(self) -> str | None:
        """The loop over the rows of a batch in which a torch model is called, when the text shows
        it: `for image in batch["image"]`, with the call in it or in a method that it calls."""
        models = self._torch_models()
        forward = [c for c in self.calls if ast.unparse(c.node.func) in models]
        within = {c.inside for c in forward} - {getattr(self.entry, "name", "<lambda>")}
        called = [
            c.node for c in self.calls if c in forward or c.name.removeprefix("self.") in within
        ]
        for node in ast.walk(self.entry) if self.known else ():
            loops = [node.iter] if isinstance(node, ast.For) else []
            loops += [g.iter for g in getattr(node, "generators", [])]
            # A column of the batch itself: chunks of it are made by other expressions.
            if not any(self._is_column(loop) for loop in loops):
                continue
            for call in called:
                around = list(_ancestors(call))
                if node in around and not any(loop in around for loop in loops):
                    return ast.unparse(node).splitlines()[0]
        return None

    def _is_column(self, node) -> bool:
        if isinstance(node, ast.Call) and _dotted(node.func) in ("zip", "enumerate"):
            return any(self._is_column(argument) for argument in node.args)
        named = isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)
        return named and node.value.id == self.parameter and _constant_key(node) is not None

    def torch_threads(self, cores: int, arguments: dict | None = None) -> int | None:
        """The number given to `torch.set_num_threads`, where it can be read. `arguments`: of the
        class's `__init__`, by name."""
        for call in self.calls + self.init_calls:
            if call.name == "torch.set_num_threads" and call.node.args:
                argument = call.node.args[0]
                for given in (_given(argument, arguments or {}), call.given):
                    if type(given) is int:
                        return given
                if isinstance(argument, ast.Constant) and isinstance(argument.value, int):
                    return argument.value
                if re.fullmatch(
                    r"(os|multiprocessing|mp|psutil)\.cpu_count\(\)", ast.unparse(argument)
                ):
                    return cores
        return None

    def conversions(self) -> list[str]:
        """Conversions between arrays, PIL images and tensors, in the order of the text."""
        found = []
        # Transforms that are built in `__init__`, or at module level, are applied to each image.
        kept = [c for c in self.init_calls if c.name.split(".")[-1] in _TRANSFORMS]
        for call in sorted(self.calls + kept, key=lambda c: (c.node.lineno, c.node.col_offset)):
            last = call.name.split(".")[-1]
            if type(call.target).__name__ in _TRANSFORMS:  # an object of the module, applied here
                last = type(call.target).__name__
            if last in ("fromarray", "ToPILImage", "to_pil_image"):
                found.append("array to PIL")
            elif call.name in ("numpy.array", "numpy.asarray") and call.node.args:
                found.append("to array")
            elif last in ("ToTensor", "to_tensor", "pil_to_tensor", "PILToTensor") or (
                call.name in ("torch.from_numpy", "torch.as_tensor", "torch.tensor")
            ):
                found.append("to tensor")
            elif last == "numpy" and not call.node.args:
                found.append("tensor to array")
        return found

    def swallowed(self) -> tuple[str, bool]:
        """A handler that turns any error into an ordinary-looking row or into none, or an expected
        one into pixels of its own, without a word: where it stands, and whether the row is gone.
        ("", False) if there is no such one."""
        for body in self.body:
            for node in ast.walk(body):
                if isinstance(node, ast.Try):
                    for handler in node.handlers:
                        much = _catches_everything(handler) or _makes_up_pixels(handler, body)
                        if much and _hides(handler):
                            where = f"line {handler.lineno}: `{_first_line(handler)}`"
                            return where, _drops(handler)
        return "", False

    def nested_pixel_loop(self) -> bool:
        """Loops within loops over ranges that do arithmetic on single elements."""
        for body in self.body:
            for outer in ast.walk(body):
                if not _ranges(outer):
                    continue
                for inner in ast.walk(outer):
                    deep = _indexes_deeply(inner, _taken_apart(outer))
                    if inner is not outer and _ranges(inner) and deep:
                        return True
        return False

    def column_loops(self) -> list[tuple[str, int]]:
        """Loops that only compute, with what they find in a column: its name, and how many levels
        of loops deep. In `for row in batch["x"]: for value in row:` the inner one is at 2, and with
        `row.ravel()` at EVERY_NUMBER or more."""
        if not self.known or self.parameter is None:
            return []
        return _ColumnLoops(self.parameter, self.calls).run(self.entry)

    def threads_itself(self) -> bool:
        """Whether the code starts threads or processes, or tells a library to: to take more than
        one."""
        text = re.sub(r"set_num(_interop)?_threads\(1\)", "", self.text)
        return bool(
            re.search(r"set_num_threads|Thread|Process|n_jobs|num_threads|num_workers", text)
        )

    @property
    def waits_for_others(self) -> bool:
        """Whether the code may need a limit on how many run at once: it talks to a service, or it
        has a lock."""
        return bool(
            re.search(
                r"requests|httpx?\b|aiohttp|urllib|boto|client|session|socket|s3|gcs|sleep|Lock"
                r"|Semaphore|connect|database|sql|api",
                self.text,
                re.IGNORECASE,
            )
        )

    def arithmetic_only(self) -> bool:
        """A row function that only computes numbers from numbers."""
        if not self.known or not self._only_reads_columns():
            return False
        allowed = {
            "abs", "dict", "enumerate", "float", "int", "len", "max", "min", "range", "round",
            "sum", "zip",
        }  # fmt: skip
        for call in self.calls:
            root = call.name.split(".")[0]
            append = call.name.endswith(".append")
            if root not in ("math", "numpy") and call.name not in allowed and not append:
                return False
        texts = [n for n in ast.walk(self.entry) if isinstance(n, ast.JoinedStr)]
        return any(isinstance(n, ast.BinOp) for n in ast.walk(self.entry)) and all(
            isinstance(getattr(n, "parent", None), ast.Subscript) for n in texts
        )


@functools.lru_cache(maxsize=512)
def facts(fn) -> Facts:
    """The facts about a function, lambda, partial, method, class or callable object."""
    try:
        return _facts(fn)
    except Exception:  # unusual code is no reason to fail: there are just no facts
        return Facts(name=getattr(fn, "__name__", type(fn).__name__), is_class=inspect.isclass(fn))


def constructor_arguments(op) -> dict:
    """The arguments that Ray Data will give to `__init__` of a class, by name."""
    fn = getattr(op, "fn", None)
    if not inspect.isclass(fn):
        return {}
    args = getattr(op, "fn_constructor_args", None) or ()
    keywords = getattr(op, "fn_constructor_kwargs", None) or {}
    try:
        bound = inspect.signature(fn).bind_partial(*args, **keywords)
    except (TypeError, ValueError):
        return {}
    bound.apply_defaults()
    return dict(bound.arguments)


def _referenced(value):
    """What a Ray reference stands for, if that is there already; anything else as it is."""
    ray = sys.modules.get("ray")
    if ray is None or not isinstance(value, ray.ObjectRef):
        return value
    if ray.is_initialized():  # else `ray.get` would start it
        with contextlib.suppress(Exception):  # not ready, or from a cluster that is gone
            return ray.get(value, timeout=0)
    return None


def _given(node, arguments: dict):
    """The value of `name`, `name.field` or `name["key"]`, if it is one of the arguments."""
    if isinstance(node, ast.Name):
        return arguments.get(node.id)
    if isinstance(node, ast.Attribute):
        holder = _given(node.value, arguments)
        return getattr(holder, "__dict__", {}).get(node.attr)
    if isinstance(node, ast.Subscript):
        holder = _given(node.value, arguments)
        return holder.get(_constant_key(node)) if isinstance(holder, dict) else None
    return None


def captured(fn) -> list[tuple[str, int]]:
    """Names and bytes of large objects that travel inside the function, largest first."""
    sizes = [(name, _size(value)) for name, value in _captured_objects(fn).items()]
    return sorted(sizes, key=lambda pair: -pair[1])


def composed(fn) -> list[str]:
    """Conversions in the torchvision transforms that the function has from outside, in order."""
    kinds = {"ToPILImage": "array to PIL"} | dict.fromkeys(("ToTensor", "PILToTensor"), "to tensor")
    return [kinds[name] for name in _composed_steps(fn) if name in kinds]


def resizes(fn) -> bool:
    """Whether a function resizes or crops: in its text, or with transforms from outside."""
    return facts(fn).resizes or any(
        name in _RESIZE or name in _RESIZING_PRESETS
        for name in [*_composed_steps(fn), *(type(o).__name__ for o in _kept_outside(fn))]
    )


def _composed_steps(fn) -> list[str]:
    """The types of the steps in a `Compose` that the function has from outside."""
    kept = [o for v in _kept_outside(fn) for o in (v if isinstance(v, list | tuple) else [v])]
    composed = [value for value in kept if type(value).__name__ == "Compose"]
    return [type(step).__name__ for value in composed for step in getattr(value, "transforms", ())]


def _kept_outside(fn) -> list:
    with contextlib.suppress(Exception):
        return list(_captured_objects(fn).values())
    return []


def _captured_objects(fn) -> dict[str, object]:
    fn = inspect.unwrap(fn) if inspect.isfunction(fn) else fn
    objects = {}
    if isinstance(fn, functools.partial):
        objects |= {f"argument {i}": value for i, value in enumerate(fn.args)}
        objects |= fn.keywords
        fn = fn.func
    functions = []
    if inspect.ismethod(fn):
        objects |= getattr(fn.__self__, "__dict__", {})
        fn = fn.__func__
    if inspect.isfunction(fn):
        functions = [fn]
    elif inspect.isclass(fn):
        objects |= {k: v for k, v in vars(fn).items() if not k.startswith("__")}
        functions = [v for v in vars(fn).values() if inspect.isfunction(v)]
    elif hasattr(fn, "__dict__"):  # an object with `__call__`
        objects |= vars(fn)
        functions = [v for v in vars(type(fn)).values() if inspect.isfunction(v)]
    seen = set()
    while functions:
        function = functions.pop()
        if function in seen or not _by_value(function):
            continue
        seen.add(function)
        found = {}
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            try:
                found[name] = cell.cell_contents
            except ValueError:
                continue
        for name in _global_names(function.__code__):
            if name in function.__globals__:
                found[name] = function.__globals__[name]
        for index, value in enumerate(function.__defaults__ or ()):
            found[f"default {index}"] = value
        for name, value in found.items():
            if inspect.isfunction(value):
                functions.append(value)
            elif not inspect.ismodule(value) and not inspect.isclass(value):
                objects[name] = value
    return objects


# ---- reading ------------------------------------------------------------------------------------


def _facts(fn) -> Facts:
    if "map_groups.<locals>" in getattr(fn, "__qualname__", "") and inspect.isfunction(fn):
        fn = _closure(fn).get("fn", fn)  # Ray Data calls the user's function for each group
    while isinstance(fn, functools.partial):
        fn = fn.func
    if inspect.ismethod(fn):
        if inspect.isclass(fn.__self__):
            return _function_facts(fn.__func__, fn.__self__)
        return _class_facts(type(fn.__self__), fn.__name__)
    if inspect.isclass(fn):
        return _class_facts(fn, "__call__")
    if inspect.isfunction(fn):
        return _function_facts(inspect.unwrap(fn))
    if callable(fn) and not inspect.isbuiltin(fn):
        return _class_facts(type(fn), "__call__")
    return Facts(name=getattr(fn, "__name__", type(fn).__name__), is_class=False)


def _function_facts(fn, cls=None) -> Facts:
    """Of a plain function, or of a class method of `cls`."""
    found = Facts(name=fn.__name__, is_class=False)
    node, aliases, lines = _find(fn.__code__)
    if node is None:
        return found
    found.entry, found.parameter = node, _first_argument(node, skip_self=cls is not None)
    methods = _Methods(cls) if cls is not None else None
    _follow(found, node, fn.__globals__, aliases, lines, methods=methods, closure=_closure(fn))
    return found


def _class_facts(cls, method: str) -> Facts:
    found = Facts(name=cls.__name__, is_class=True)
    entry = inspect.unwrap(getattr(cls, method))
    node, aliases, lines = _find(entry.__code__)
    if node is None:
        return found
    found.entry, found.parameter = node, _first_argument(node, skip_self=True)
    found.cls = node.parent if isinstance(getattr(node, "parent", None), ast.ClassDef) else None
    methods = _Methods(cls)
    _follow(found, node, entry.__globals__, aliases, lines, methods=methods)
    start = Facts(name=found.name, is_class=True)
    methods.pop(method, None)  # `__init__` may try it out; that is no part of the start
    found.init = _follow_init(start, methods)
    found.init_calls = start.calls
    found.init_text = start.call_text
    if found.cls is not None:
        found.call_text += "\n" + "\n".join(ast.unparse(d) for d in found.cls.decorator_list)
    return found


def _follow_init(found: Facts, methods: "_Methods"):
    """Collect the calls of `__init__`, and of those of the objects that it makes."""
    init = None
    if "__init__" in methods:
        init, aliases, lines = _find(methods["__init__"].__code__)
        if init is not None:
            _follow(found, init, methods["__init__"].__globals__, aliases, lines, methods)
    for part in methods.parts.values():
        _follow_init(found, part)
    return init


class _Methods(dict):
    """name -> function, of the user's own methods of a class and its bases. `parts`: the same of
    the objects of the user's that `__init__` makes and keeps, by attribute."""

    def __init__(self, cls, depth: int = 0):
        for base in reversed(cls.__mro__):
            for name, value in vars(base).items():
                value = getattr(value, "__func__", getattr(value, "fget", value))
                if inspect.isfunction(value) and _is_users(value.__code__.co_filename):
                    self[name] = inspect.unwrap(value)
        kept = _made_in(self["__init__"]) if "__init__" in self and depth < 2 else {}
        self.parts = {attribute: _Methods(part, depth + 1) for attribute, part in kept.items()}

    def reached(self, name: str) -> tuple[object, "_Methods"]:
        """The function that runs for `self.name(...)`, and the methods of its own object."""
        if name in self:
            return self[name], self
        attribute, _, method = name.partition(".")
        part = self.parts.get(attribute, {})
        return part.get(method or "__call__"), part


def _made_in(init) -> dict[str, type]:
    """attribute -> class, where `__init__` says `self.attribute = UsersClass(...)`. Not a model,
    which is what it does and not how the work is divided."""
    node, torch = _find(init.__code__)[0], sys.modules.get("torch")
    scope, found = init.__globals__ | _closure(init), {}
    for child in ast.walk(node) if node is not None else ():
        if isinstance(child, ast.Assign) and isinstance(child.value, ast.Call):
            cls, name = _resolve(_dotted(child.value.func) or "", scope), _assigned(child.value)
            if not inspect.isclass(cls) or not name or not name.startswith("self."):
                continue
            if _is_users(_file_of(cls)) and not (torch and issubclass(cls, torch.nn.Module)):
                found[name.removeprefix("self.")] = cls
    return found


def _property_getter(child, methods) -> object:
    """The function that runs where a property stands, as in `self.model(batch)`."""
    own = isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name)
    if own and child.value.id == "self" and isinstance(child.ctx, ast.Load):
        function = (methods or {}).get(child.attr)
        node = _find(function.__code__)[0] if function is not None else None
        decorators = [ast.unparse(d) for d in getattr(node, "decorator_list", ())]
        return function if "property" in decorators else None
    return None


def _follow(
    found,
    node,
    scope,
    aliases,
    lines,
    methods=None,
    closure=None,
    depth=0,
    seen=None,
    guarded=False,
):
    """Collect the calls of `node`, and of the user's own functions and methods that it calls.
    `guarded`: it is itself called only when something is not there yet."""
    seen = set() if seen is None else seen
    if id(node) in seen or depth > 3:
        return
    seen.add(id(node))
    found.body.append(node)
    found.call_text += "\n" + ast.unparse(node)
    aliases = aliases | _imports(node)
    scope = dict(scope) | (closure or {})
    name = getattr(node, "name", "<lambda>")
    for child in ast.walk(node):
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            found.strings.add(child.value)
        if getter := _property_getter(child, methods):
            inner, inner_aliases, inner_lines = _find(getter.__code__)
            found.properties.add(getter.__name__)
            _follow(
                found, inner, getter.__globals__, inner_aliases, inner_lines,
                methods, None, depth + 1, seen, guarded or _guarded(child),
            )  # fmt: skip
        if not isinstance(child, ast.Call):
            continue
        dotted = _dotted(child.func) or _chosen(child.func)
        if dotted is None:
            if isinstance(child.func, ast.Attribute):  # something(...).attribute(...)
                dotted = "?." + child.func.attr
            else:
                continue
        first, _, rest = dotted.partition(".")
        full = aliases.get(first, first) + ("." + rest if rest else "")
        call = Call(full, child, name, guarded or _guarded(child))
        call.target = _resolve(dotted, scope)
        if dotted == "cls" and inspect.isclass(call.target):
            call.name = call.target.__name__
        if call.guarded:
            call.kept_in = scope.get("__name__", "")
        if child.args and (argument := _dotted(child.args[0])):
            call.given = _resolve(argument, scope)
        found.calls.append(call)
        target = call.target
        own = methods
        if first in ("self", "cls") and methods:
            method, where = methods.reached(rest)
            target, own = (method, where) if method else (target, methods)
        if hasattr(target, "__wrapped__") and hasattr(target, "cache_info"):
            call.guarded, call.kept_in = True, ""
            continue
        for function in [target, *_applied(child, scope)]:
            if not inspect.isfunction(function) or not _is_users(function.__code__.co_filename):
                continue
            inner, inner_aliases, inner_lines = _find(function.__code__)
            known = _closure(function) | _own_class(dotted, scope)
            if inner is not None and _remembers(inner):
                call.guarded, call.kept_in = True, function.__module__  # it builds once
                once = Facts(function.__name__, is_class=False)
                _follow(
                    once, inner, function.__globals__, inner_aliases, inner_lines,
                    own, known, depth + 1, set(seen),
                )  # fmt: skip
                call.makes_model = any(_builds_model(c, once) for c in once.calls)
            elif inner is not None:
                _follow(
                    found, inner, function.__globals__, inner_aliases, inner_lines,
                    own, known, depth + 1, seen, call.guarded,
                )  # fmt: skip


_APPLIES = {"apply", "applymap", "apply_along_axis", "imap", "map", "starmap", "vectorize"}


def _applied(call: ast.Call, scope: dict) -> list:
    """What `map(function, ...)`, `series.apply(function)` and the like call for each element; and
    what `step(x)` calls in a loop over functions: `for step in (one, other)`."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    names = call.args if name in _APPLIES else []
    for loop in _ancestors(call) if isinstance(call.func, ast.Name) else ():
        if isinstance(loop, ast.For) and ast.unparse(loop.target) == name:
            steps = _resolve(_dotted(loop.iter) or "", scope)
            if isinstance(steps, tuple | list):
                return list(steps)
            names = getattr(loop.iter, "elts", [])
    return [_resolve(dotted, scope) for dotted in map(_dotted, names) if dotted]


def _own_class(dotted: str, scope: dict) -> dict:
    """What `cls` stands for in `Class.method(...)`."""
    owner = _resolve(dotted.rpartition(".")[0], scope)
    return {"cls": owner} if inspect.isclass(owner) else {}


def _find(code):
    """The syntax node of a code object, the imports of its file, and the file's lines."""
    tree, lines = _parse(code.co_filename)
    if tree is None:
        return None, {}, []
    candidates = []
    for node in ast.walk(tree):
        if code.co_name == "<lambda>":
            if isinstance(node, ast.Lambda) and node.lineno == code.co_firstlineno:
                candidates.append(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == code.co_name:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if first <= code.co_firstlineno <= node.lineno:
                candidates.append(node)
    if len(candidates) > 1:  # several lambdas in one line: the one with the same parts
        wanted = (code.co_varnames[: code.co_argcount], _parts(code))
        candidates = [n for n in candidates if _lambda_parts(n) == wanted][:1]
    return (candidates[0] if candidates else None), _imports(tree, top=True), lines


def _parts(code) -> set[str]:
    strings = {c for c in code.co_consts if isinstance(c, str) and c != code.co_qualname}
    return strings | set(code.co_names)


def _lambda_parts(node):
    names = tuple(a.arg for a in node.args.args)
    try:
        code = compile(ast.Expression(node), "<doctor>", "eval").co_consts[0]
        return names, _parts(code)
    except (ValueError, SyntaxError, IndexError, AttributeError):
        return names, None


def _parse(filename: str):
    lines = linecache.getlines(filename)
    if not lines:
        return None, []
    return _parse_text(filename, "".join(lines)), lines


@functools.lru_cache(maxsize=256)
def _parse_text(filename: str, text: str):
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a notebook cell with magics
        kept = [("pass" if re.match(r"\s*[%!]", line) else line) for line in text.splitlines()]
        try:
            tree = ast.parse("\n".join(kept))
        except SyntaxError:
            return None
    for parent in ast.walk(tree):
        for child in ast.iter_child_nodes(parent):
            child.parent = parent
    return tree


def _imports(tree, top: bool = False) -> dict[str, str]:
    """alias -> dotted name. `top`: of a file, also within functions' `if` and `try`."""
    found = {}
    for node in tree.body if top else ast.walk(tree):
        for inner in ast.walk(node) if top and not _is_definition(node) else [node]:
            if isinstance(inner, ast.Import):
                for name in inner.names:
                    found[name.asname or name.name.split(".")[0]] = (
                        name.name if name.asname else name.name.split(".")[0]
                    )
            elif isinstance(inner, ast.ImportFrom) and inner.module:
                for name in inner.names:
                    found[name.asname or name.name] = f"{inner.module}.{name.name}"
    return found


def _is_definition(node) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def _dotted(node) -> str | None:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        return ".".join([node.id, *reversed(parts)])
    if parts:
        return "?." + parts[0]
    return None


def _chosen(node) -> str | None:
    """The dotted name of `getattr(module, name)`; "getattr" stands for a name that varies."""
    if isinstance(node, ast.Call) and _dotted(node.func) == "getattr" and len(node.args) >= 2:
        owner, name = _dotted(node.args[0]), node.args[1]
        constant = isinstance(name, ast.Constant) and isinstance(name.value, str)
        return f"{owner}.{name.value if constant else 'getattr'}" if owner else None
    return None


def _resolve(dotted: str, scope: dict):
    first, *rest = dotted.split(".")
    value = scope.get(first)
    for part in rest:
        if not inspect.ismodule(value) and not inspect.isclass(value):
            return None  # no attribute of the user's objects is touched: it may run code
        value = vars(value).get(part) if not inspect.ismodule(value) else getattr(value, part, None)
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
    return value


def _closure(fn) -> dict:
    found = {}
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:
            continue
    return found


_LIBRARIES = tuple(
    {os.path.realpath(p) for k, p in sysconfig.get_paths().items() if "lib" in k}
    | {os.path.realpath(os.path.dirname(os.__file__))}
)


def _is_users(filename: str) -> bool:
    return not os.path.realpath(filename).startswith(_LIBRARIES) and not filename.startswith("<fr")


def _first_argument(node, skip_self: bool) -> str | None:
    names = [a.arg for a in [*node.args.posonlyargs, *node.args.args]]
    names = names[1:] if skip_self else names
    return names[0] if names else None


def _constant_key(node) -> str | None:
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return node.slice.value if isinstance(node.slice.value, str) else None
    return None


def _is_get(attribute) -> bool:
    call = getattr(attribute, "parent", None)
    return (
        attribute.attr == "get"
        and isinstance(call, ast.Call)
        and bool(call.args)
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    )


def _reads_column(node, column: str) -> bool:
    return isinstance(node, ast.Subscript) and _constant_key(node) == column


def _single_return(entry):
    if isinstance(entry, ast.Lambda):
        return entry.body
    body = [n for n in entry.body if not _is_docstring(n)]
    if len(body) == 1 and isinstance(body[0], ast.Return):
        return body[0].value
    return None


def _is_docstring(node) -> bool:
    return isinstance(node, ast.Expr) and _is_text(node.value)


def _mask_of(result, parameter: str):
    """The expression that chooses the rows, where `result` is the batch with fewer rows."""
    if isinstance(result, ast.DictComp) and len(result.generators) == 1:
        source = ast.unparse(result.generators[0].iter)
        chosen = isinstance(result.value, ast.Subscript) and not result.generators[0].ifs
        return result.value.slice if chosen and source == f"{parameter}.items()" else None
    if isinstance(result, ast.Call) and isinstance(result.func, ast.Attribute):
        inner, method = result.func.value, result.func.attr
        if method in ("reset_index", "copy"):
            return _mask_of(inner, parameter)
        own = method == "filter" and len(result.args) == 1 and not result.keywords
        return result.args[0] if own and ast.unparse(inner) == parameter else None
    if isinstance(result, ast.Subscript) and _constant_key(result) is None:
        own = ast.unparse(result.value) in (parameter, f"{parameter}.loc")
        return result.slice if own else None
    return None


def _is_text(node) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _ancestors(node):
    while (node := getattr(node, "parent", None)) is not None:
        yield node


def _guarded(node) -> bool:
    """Whether the call is only made when something is not there yet."""
    for parent in _ancestors(node):
        if isinstance(parent, ast.If | ast.IfExp):
            test = ast.unparse(parent.test)
            if re.search(r"is None|not in |hasattr|^not |getattr|cached|loaded|==\s*None", test):
                return True
        if isinstance(parent, ast.Try) and any(
            h.type is not None
            and re.search("NameError|AttributeError|KeyError", ast.unparse(h.type))
            for h in parent.handlers
        ):
            return True
        if isinstance(parent, ast.BoolOp):  # cache or build()
            return True
        if isinstance(parent, ast.FunctionDef):
            decorators = " ".join(ast.unparse(d) for d in parent.decorator_list)
            if re.search(r"cache", decorators):
                return True
            # if MODEL is not None: return MODEL, and then the loading
            for statement in parent.body:
                if (
                    isinstance(statement, ast.If)
                    and re.search(r" in | is not None|hasattr", ast.unparse(statement.test))
                    and any(isinstance(s, ast.Return) for s in statement.body)
                    and statement.lineno < node.lineno
                ):
                    return True
            return False
    return False


def _remembers(function) -> bool:
    """Whether a function keeps what it made, and only makes it when it is not there yet."""
    for node in ast.walk(function):
        if isinstance(node, ast.Global):
            return True
        if isinstance(node, ast.If):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Assign) and any(
                    isinstance(t, ast.Subscript | ast.Attribute) for t in inner.targets
                ):
                    return True
    return False


def _builds_model(call: Call, found: Facts) -> bool:
    name, last = call.name, call.name.split(".")[-1]
    if call.makes_model or name in _LOADERS or last in ("from_pretrained", "load_state_dict"):
        return True
    if name.startswith("torchvision.models."):
        return last[:1].islower() and last not in ("list_models", "get_model_weights", "transforms")
    if name.startswith("self.") or name.startswith("?."):
        return False
    target = call.target
    torch = sys.modules.get("torch")
    if inspect.isclass(target) and torch is not None and issubclass(target, torch.nn.Module):
        return _is_users(_file_of(target)) or last in ("Sequential",)
    if target is not None and not _is_users(_file_of(target)):
        return False
    if "." in name and target is None:
        return False
    if inspect.isclass(target):
        return bool(_MODEL_CLASS.match(last))
    if inspect.isfunction(target):
        return bool(_BUILDER.match(last) or _ARCHITECTURE.match(last))
    return False


def _file_of(target) -> str:
    try:
        return inspect.getfile(target)
    except (TypeError, OSError):  # defined in the script itself, or built in
        return (
            "" if getattr(target, "__module__", "") in ("__main__", "__mp_main__") else "<frozen>"
        )


def _is_torch_model(call: Call, found: Facts) -> bool:
    """A module that is called as `self.x(batch)` with autograd on, unless somebody turns it off."""
    name, last = call.name, call.name.split(".")[-1]
    if name.startswith("torchvision.models.") and _builds_model(call, found):
        return True
    if name in ("timm.create_model", "torch.jit.load", "torch.hub.load"):
        return True
    if last == "from_pretrained" and re.search(r"Model|For[A-Z]", name):
        return "pipeline" not in found.text
    target = call.target
    torch = sys.modules.get("torch")
    if torch is not None and inspect.isclass(target) and issubclass(target, torch.nn.Module):
        # Transforms and activations are modules too, and have no weights.
        with_weights = r"Linear|Conv|LSTM|GRU|RNN|Transformer|Embedding|Sequential"
        return _is_users(_file_of(target)) or bool(re.match(with_weights, last))
    builds = _BUILDER.match(last) or _ARCHITECTURE.match(last)
    if inspect.isfunction(target) and _is_users(target.__code__.co_filename) and builds:
        # a builder of the user's own, in whose body a torch model stands
        return bool(re.search(r"torch|resnet", found.text)) and ".eval()" in found.text
    return False


def _learns(value, torch) -> bool:
    return isinstance(value, torch.nn.Module) and any(p.requires_grad for p in value.parameters())


def _assigned(node) -> str | None:
    """`self.x` or `x` of `x = <something with node>`."""
    for parent in _ancestors(node):
        if isinstance(parent, ast.Assign):
            names = [ast.unparse(t) for t in parent.targets]
            return next((n for n in names if re.fullmatch(r"(self\.)?\w+", n)), None)
        if isinstance(parent, ast.stmt):
            return None
    return None


def _catches_everything(handler) -> bool:
    if handler.type is None:
        return True
    return ast.unparse(handler.type) in ("Exception", "BaseException")


_STATUS = re.compile(
    r"error|status|ok\b|valid|fail|bad|reject|corrupt|skipp|broken|missing"
    r"|readable|success|usable",
    re.I,
)


def _hides(handler) -> bool:
    """The handler goes on with a made-up value, and neither raises nor records the error."""
    text = "\n".join(ast.unparse(n) for n in handler.body)
    if any(isinstance(n, ast.Raise) for body in handler.body for n in ast.walk(body)):
        return False
    statements = [n for body in handler.body for n in ast.walk(body)]
    rows = [n for n in statements if isinstance(n, ast.Return | ast.Assign)]
    appends = "append(" in text
    if not rows and not appends and not _drops(handler):
        return False
    if re.search(r"\b(logging|logger|log|print|warnings)\b|\+=", text) and _drops(handler):
        return False  # gone, and somebody is told
    if any(isinstance(n, ast.Return) and _is_nothing(n.value) for n in rows):
        return False
    logged = re.sub(r"(logging|logger|log|print|warnings)\.?\w*\([^\n]*\)", "", text)
    if handler.name and re.search(rf"\b{handler.name}\b", logged):
        return False
    return not _STATUS.search(logged)


def _makes_up_pixels(handler, function) -> bool:
    """Whether the handler puts an image of one color in the place of one that was not read, and no
    word of the function around it could be a mark of that."""
    text = "\n".join(ast.unparse(n) for n in handler.body)
    if not re.search(r"\bImage\.new\(|\b(np|numpy|torch)\.(zeros|ones|full|empty)\(", text):
        return False
    values = [n.value for b in handler.body for n in ast.walk(b) if isinstance(n, ast.Constant)]
    if any(value is None or isinstance(value, bool) for value in values) or "nan" in text:
        return False  # that may be the mark
    lines = ast.unparse(function).splitlines()
    around = [line for line in lines if not line.lstrip().startswith("except")]
    return not _STATUS.search("\n".join(around))


def _is_nothing(node) -> bool:
    return node is None or (isinstance(node, ast.Dict) and not node.keys)


def _drops(handler) -> bool:
    """Whether the handler leaves the row out: it ends in `return []`, or is just `continue`."""
    last = handler.body[-1]
    if isinstance(last, ast.Return):
        return isinstance(last.value, ast.List | ast.Tuple) and not last.value.elts
    return len(handler.body) == 1 and isinstance(last, ast.Continue)


def _first_line(handler) -> str:
    head = f"except {ast.unparse(handler.type)}" if handler.type else "except"
    return f"{head}: {ast.unparse(handler.body[-1]).splitlines()[0][:60]}"


EVERY_NUMBER = 100  # more levels of loops than any column has: over all that is in a row


def _flattens(method: str, arguments: list) -> bool:
    """`ravel()`, `flatten()`, `reshape(-1)`, and `reshape(-1, 3)`: one loop visits every pixel."""
    if method == "reshape" and arguments:
        sizes = [ast.unparse(a) for a in arguments]
        return sizes[0] == "-1" and all(s in ("1", "2", "3", "4") for s in sizes[1:])
    return method in ("ravel", "flatten")


class _ColumnLoops:
    """Follows the values of columns through assignments and loops of one function."""

    _WRAPPERS = {"zip", "enumerate", "list", "reversed", "iter", "tolist", "asarray", "array"}
    _COMPUTES = {
        "abs", "append", "bool", "enumerate", "float", "int", "len", "max", "min", "pow", "range",
        "round", "sum", "zip",
    }  # fmt: skip

    def __init__(self, parameter: str, calls: list[Call]):
        self.parameter, self.found = parameter, []
        self.functions = {id(c.node): c for c in calls}

    def run(self, entry) -> list[tuple[str, int]]:
        self._visit(entry, {})
        return self.found

    def _visit(self, node, known) -> None:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            value = self._column(node.value, known)
            if isinstance(node.targets[0], ast.Name) and value:
                known[node.targets[0].id] = value
        if isinstance(node, ast.For):
            self._loop(node, node.target, node.iter, known)
        for generator in getattr(node, "generators", []):
            self._loop(node, generator.target, generator.iter, known)
        for child in ast.iter_child_nodes(node):
            self._visit(child, known)

    def _loop(self, node, target, source, known) -> None:
        value = self._column(source, known)
        if value is None:
            return
        column, depth = value
        by_index = isinstance(source, ast.Call) and _dotted(source.func) == "range"
        if not by_index:
            known |= {
                n.id: (column, depth + 1) for n in ast.walk(target) if isinstance(n, ast.Name)
            }
        # `for r, g, b in line` visits each of the three, too.
        single = isinstance(source, ast.Name | ast.Subscript | ast.Attribute)
        depth += isinstance(target, ast.Tuple) and single
        if self._computes(node):
            self.found.append((column, depth + 1))

    def _column(self, node, known) -> tuple[str, int] | None:
        """The column that an expression stands for, and how deep in it."""
        if isinstance(node, ast.Name):
            return known.get(node.id)
        if isinstance(node, ast.Subscript):
            if isinstance(node.value, ast.Name) and node.value.id == self.parameter:
                key = _constant_key(node)
                return (key, 0) if key else None
            value = self._column(node.value, known)
            return value if value is None or _slices(node) else (value[0], value[1] + 1)
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            inside = [node.func.value] if isinstance(node.func, ast.Attribute) else []
            if inside and _flattens(name, node.args):
                value = self._column(inside[0], known)
                return value and (value[0], EVERY_NUMBER)
            if name in self._WRAPPERS or name in ("range", "len"):
                found = (self._column(n, known) for n in [*node.args, *inside])
                return next((value for value in found if value), None)
        return None

    def _computes(self, loop) -> bool:
        """Arithmetic, and no call that could work on more than a number; no loop inside."""
        arithmetic = False
        own = [loop.iter] if isinstance(loop, ast.For) else [g.iter for g in loop.generators]
        source = {inner for iterable in own for inner in ast.walk(iterable)}  # evaluated once
        for node in ast.walk(loop):
            if node in source:
                continue
            inner = isinstance(node, ast.For | ast.While) or getattr(node, "generators", None)
            if node is not loop and inner:
                return False
            arithmetic |= isinstance(node, ast.BinOp | ast.AugAssign)
            if isinstance(node, ast.Call):
                call = self.functions.get(id(node))
                name = call.name if call else ast.unparse(node.func)
                if name.endswith(".append"):
                    name = "append"
                if not name.startswith("math.") and name not in self._COMPUTES:
                    return False
        return arithmetic


def _ranges(node) -> bool:
    if isinstance(node, ast.For):
        return re.match(r"range\(", ast.unparse(node.iter)) is not None
    if isinstance(node, ast.ListComp | ast.GeneratorExp):
        return any(re.match(r"range\(", ast.unparse(g.iter)) for g in node.generators)
    return False


def _taken_apart(loop) -> set[str]:
    """Names that a loop gives to single elements: `row = rows[y]`."""
    names = set()
    for node in ast.walk(loop):
        if isinstance(node, ast.Assign):
            targets = getattr(node.targets[0], "elts", node.targets)
            values = getattr(node.value, "elts", [node.value])
            for target, value in zip(targets, values, strict=False):
                taken = isinstance(value, ast.Subscript) and not _slices(value)
                if taken and isinstance(target, ast.Name) and _constant_key(value) is None:
                    names.add(target.id)
    return names


def _indexes_deeply(node, elements: set[str]) -> bool:
    """Whether single elements are visited, as in `a[y, x]`, or in arithmetic `row[x]` with `row`
    among `elements`; a part of an array is none."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and inner.attr in ("getpixel", "putpixel"):
            return True
        if not isinstance(inner, ast.Subscript) or _slices(inner):
            continue
        deep = isinstance(inner.value, ast.Subscript) and not _slices(inner.value)
        if isinstance(inner.value, ast.Name) and inner.value.id in elements:
            counted = not isinstance(inner.slice, ast.Constant)
            deep |= counted and isinstance(inner.parent, ast.BinOp | ast.AugAssign)
        if isinstance(inner.slice, ast.Tuple) or deep:
            return True
    return False


def _slices(subscript: ast.Subscript) -> bool:
    index = subscript.slice
    return any(isinstance(i, ast.Slice) for i in getattr(index, "elts", [index]))


def _global_names(code) -> set[str]:
    # Not all of `co_names`: they hold attributes, too, and `self.model` is no global `model`.
    names = {i.argval for i in dis.get_instructions(code) if i.opname.endswith("_GLOBAL")}
    for constant in code.co_consts:
        if inspect.iscode(constant):
            names |= _global_names(constant)
    return names


def _by_value(function) -> bool:
    """Whether the function travels with what it refers to, and not as "import it there"."""
    return function.__module__ in _SCRIPT or "<locals>" in function.__qualname__


def _size(value) -> int:
    """Bytes that the object needs when it is serialized; 0 when that cannot be said."""
    if value is None or isinstance(value, int | float | bool | complex):
        return 0
    if isinstance(value, str | bytes | bytearray):
        return len(value)
    if type(value).__module__.startswith("ray"):
        return 0  # references and datasets travel as a name
    size = getattr(value, "nbytes", None)
    if isinstance(size, int):
        return size
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.nn.Module):
        return sum(t.numel() * t.element_size() for t in value.state_dict().values())
    try:
        import ray.cloudpickle as pickle

        return len(pickle.dumps(value))
    except Exception:  # it cannot travel: then Ray itself says so
        return 0
