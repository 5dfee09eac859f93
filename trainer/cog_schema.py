"""The schema that Cog's server validates requests by, made of train.py and predict.py as `cog build` makes it.

    python -m trainer.cog_schema [FILE]      writes FILE [default: .cog/openapi_schema.json, where the server looks]

Only for servers that are started without `cog build`. Like Cog, it parses the files and runs nothing; unlike Cog, it
refuses what Cog would drop without a word.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLACE = Path(".cog/openapi_schema.json")
_TYPES: Mapping[str, dict[str, Any]] = {
    "bool": {"type": "boolean"},
    "float": {"type": "number"},
    "int": {"type": "integer"},
    "str": {"type": "string"},
    "Path": {"type": "string", "format": "uri"},
    "Secret": {"type": "string", "format": "password", "writeOnly": True, "x-cog-secret": True},
}
_KEYS = {
    "default": "default",
    "description": "description",
    "ge": "minimum",
    "le": "maximum",
    "min_length": "minLength",
    "max_length": "maxLength",
    "regex": "pattern",
    "deprecated": "deprecated",
    "accept": "x-cog-accept",
}


class SchemaError(ValueError):
    """A signature that Cog would misread."""


def schema(train: str, predict: str) -> dict[str, Any]:
    """The OpenAPI document of both files (their text)."""
    components: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for text, function, request, output in (
        (predict, "run", "Input", "Output"),
        (train, "train", "TrainingInput", "TrainingOutput"),
    ):
        module = ast.parse(text)
        found = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef) and node.name == function]
        if len(found) != 1:
            raise SchemaError(f"there must be one function {function}, and there are {len(found)}")
        properties, required, enums = _inputs(found[0])
        for name, values in enums.items():
            if components.setdefault(name, values) != values:
                raise SchemaError(f"both doors have choices named {name}; Cog would take one list for both")
        own = {"type": "object", "title": request, "properties": properties}
        components[request] = own | ({"required": required} if required else {})
        components[output] = _output(found[0].returns, module)
        what = "predictions" if function == "run" else "trainings"
        paths[f"/{what}"] = {"post": _operation(what, request, output, components)}
        paths[f"/{what}/{{id}}/cancel"] = {"post": {"responses": {"200": {"description": "Successful Response"}}}}
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": paths,
        "components": {"schemas": components},
    }


def _inputs(function: ast.FunctionDef) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """(properties, names that are required, enumerations) of a signature."""
    properties: dict[str, Any] = {}
    required: list[str] = []
    enums: dict[str, Any] = {}
    arguments = [one for one in function.args.args if one.arg != "self"]
    if len(arguments) != len(function.args.defaults) or function.args.kwonlyargs or function.args.kwarg:
        raise SchemaError(f"every parameter of {function.name} needs an Input(...)")
    for order, (argument, call) in enumerate(zip(arguments, function.args.defaults, strict=True)):
        given = _options(argument.arg, call)
        kinds = _kinds(argument.arg, argument.annotation)
        nullable = "None" in kinds
        kinds = [kind for kind in kinds if kind != "None"]
        if len(kinds) > 1 and given.keys() & {"choices", "ge", "le", "min_length", "max_length", "regex"}:
            raise SchemaError(f"{argument.arg}: Cog takes no bounds on a union")
        shapes = [_shape(kind) for kind in kinds]
        one: dict[str, Any] = {"x-order": order}
        if "choices" in given:
            enums[argument.arg] = {"title": argument.arg, "description": "An enumeration.",
                                   "enum": given.pop("choices"), **shapes[0]}  # fmt: skip
            one["allOf"] = [{"$ref": f"#/components/schemas/{argument.arg}"}]
        else:
            one["title"] = argument.arg.replace("_", " ").title()
            one |= shapes[0] if len(shapes) == 1 else {"anyOf": [shape | {"nullable": True} for shape in shapes]}
        if "default" not in given:
            required.append(argument.arg)
        elif given["default"] is None and not nullable:
            raise SchemaError(f"{argument.arg}: a default of None on a type without None makes it required")
        properties[argument.arg] = one | {_KEYS[key]: value for key, value in given.items()}
        if nullable:
            properties[argument.arg]["nullable"] = True
    return properties, required, enums


def _options(name: str, call: ast.expr) -> dict[str, Any]:
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Input"):
        raise SchemaError(f"{name}: Cog reads Input(...) only")
    if call.args:
        raise SchemaError(f"{name}: Cog ignores a default that is not named")
    try:
        given = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except ValueError as error:
        raise SchemaError(f"{name}: Cog drops what is not literal") from error
    strange = given.keys() - {*_KEYS, "choices"}
    if strange:
        raise SchemaError(f"{name}: Cog knows no {', '.join(sorted(strange))}")
    return given


def _kinds(name: str, annotation: ast.expr | None) -> list[str]:
    if annotation is None:
        raise SchemaError(f"{name} needs a type")
    kinds = [kind.strip() for kind in ast.unparse(annotation).split("|")]
    strange = [kind for kind in kinds if kind != "None" and kind.removeprefix("list[").removesuffix("]") not in _TYPES]
    if strange:
        raise SchemaError(f"{name}: Cog has no type {strange[0]}")
    return kinds


def _shape(kind: str) -> dict[str, Any]:
    if kind.startswith("list["):
        return {"type": "array", "items": dict(_TYPES[kind[5:-1]])}
    return dict(_TYPES[kind])


def _output(returns: ast.expr | None, module: ast.Module) -> dict[str, Any]:
    """Of a list or of a class of the file, whose fields are types that Cog knows."""
    kind = "" if returns is None else ast.unparse(returns)
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == kind:
            fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
            shapes = {ast.unparse(one.target): _kinds(ast.unparse(one.target), one.annotation) for one in fields}
            bare = {name: [kind for kind in kinds if kind != "None"] for name, kinds in shapes.items()}
            return {
                "type": "object",
                "title": "Output",
                "properties": {name: _shape(kinds[0]) | {"title": name.title()} for name, kinds in bare.items()},
                "required": [name for name, kinds in shapes.items() if "None" not in kinds],
            }
    _kinds("the output", returns)
    return {"title": "Output", **_shape(kind)}


def _operation(what: str, request: str, output: str, components: dict[str, Any]) -> dict[str, Any]:
    """Of POST /predictions or /trainings; its request and response join the components."""
    kind = "Prediction" if what == "predictions" else "Training"
    asked = {"id": {"type": "string"}, "input": {"$ref": f"#/components/schemas/{request}"}}
    answered = asked | {"output": {"$ref": f"#/components/schemas/{output}"}, "status": {"type": "string"}}
    answered |= {"error": {"type": "string"}, "logs": {"type": "string"}, "metrics": {"type": "object"}}
    components[f"{kind}Request"] = {"type": "object", "title": f"{kind}Request", "properties": asked}
    components[f"{kind}Response"] = {"type": "object", "title": f"{kind}Response", "properties": answered}

    def body(name: str) -> dict[str, Any]:
        return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}

    return {
        "requestBody": body(f"{kind}Request"),
        "responses": {"200": {"description": "Successful Response", **body(f"{kind}Response")}},
    }


def main(argv: Sequence[str] | None = None) -> int:
    place = Path(*(sys.argv[1:] if argv is None else argv)[:1] or [PLACE])
    made = schema(*((ROOT / name).read_text(encoding="utf-8") for name in ("train.py", "predict.py")))
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(made, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
