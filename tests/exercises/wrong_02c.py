HANDLE = "            self._handle(change)\n"
SAVE = '            self._tokens.save(change["_id"])\n'
LOOP = f"        for change in self._products.watch(self._tokens.load()):\n{HANDLE}{SAVE}"
PUT_BACK = """        last = self._tokens.load()
        for change in self._products.watch(last):
            try:
                self._tokens.save(change["_id"])
                self._handle(change)
            except BaseException:
                self._tokens.save(last)
                raise
            last = change["_id"]
"""
AT_THE_END = '            last = change["_id"]\n        self._tokens.save(last)\n'
INSERT = '            case "insert" | "update" | "replace":\n'
ADD = """            case "insert":
                self._index.add(key, change["fullDocument"])
            case "update" | "replace":
"""
TRY = f"            try:\n    {HANDLE}"
CASES = f"""{INSERT}                self._index.replace(key, change["fullDocument"])
            case "delete" if key in self._index:
                self._index.remove(key)
"""
CASES_PASSED_OVER = """            case "insert":
                self._index.replace(key, change["fullDocument"])
            case other:
                try:
                    if other != "delete":
                        self._index.replace(key, change["fullDocument"])
                    elif key in self._index:
                        self._index.remove(key)
                except Exception:
                    pass
"""

WRONG = {
    "token-first": [(HANDLE + SAVE, SAVE + HANDLE)],
    "swapped-and-no-more": [(INSERT, ADD), (" if key in self._index:", ":")],
    "insert-raises-again": [(INSERT, ADD)],
    "token-in-finally": [(HANDLE + SAVE, f"{TRY}            finally:\n    {SAVE}")],
    "token-put-back": [(LOOP, PUT_BACK)],
    "errors-passed-over": [
        (HANDLE, f"{TRY}            except Exception:\n                continue\n")
    ],
    "errors-of-updates-and-deletes-passed-over": [(CASES, CASES_PASSED_OVER)],
    "no-token": [(SAVE, "")],
    "one-token-at-the-end": [(SAVE, AT_THE_END)],
}
