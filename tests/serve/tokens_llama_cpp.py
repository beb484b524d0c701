"""The token ids of texts in llama.cpp, in the Python of .venv/serve-llama-cpp: tokens_llama_cpp.py JOB RESULT.

The job is JSON with "files" (name -> GGUF file) and "texts"; the result is name -> token ids, text by text.
"""

import json
import sys
from pathlib import Path

import llama_cpp

job = json.loads(Path(sys.argv[1]).read_text())
result = {}
for name, file in job["files"].items():
    model = llama_cpp.Llama(file, vocab_only=True, verbose=False)
    # special: the name of a special token in a text is that token, as in transformers
    result[name] = [model.tokenize(text.encode(), add_bos=True, special=True) for text in job["texts"]]
Path(sys.argv[2]).write_text(json.dumps(result))
