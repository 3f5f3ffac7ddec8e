import re
from pathlib import Path

SOLUTION = Path(__file__).parents[2] / "exercises" / "solutions" / "02b_bulk_report.py"
BODY = re.search(r"    try:\n.*?(?=    return report\n\Z)", SOLUTION.read_text("utf-8"), re.S)[0]
SUM = 'report.stored = error.details["nInserted"]'
CONCERN = 'if error.details["writeConcernErrors"]:'
REJECTED = '                report.rejected[refusal["op"]["_id"]] = refusal["code"]\n'
IS_KNOWN = 'refusal["code"] == DUPLICATE_KEY and refusal["keyPattern"] == {"_id": 1}'
UNORDERED_AND_NO_MORE = """
    try:
        events.insert_many(documents, ordered=False)
    except BulkWriteError as error:
        for refusal in error.details["writeErrors"]:
            if refusal["code"] == DUPLICATE_KEY:
                report.already_there += 1
    report.stored = len(documents) - report.already_there
"""
ONE_BY_ONE = """
    from pymongo.errors import WriteError
    for document in documents:
        try:
            events.insert_one(document)
            report.stored += 1
        except WriteError as error:
            if error.code == DUPLICATE_KEY and error.details["keyPattern"] == {"_id": 1}:
                report.already_there += 1
            else:
                report.rejected[document["_id"]] = error.code
"""

WRONG = {
    "still-ordered": [("(documents, ordered=False)", "(documents)")],
    "unordered-and-no-more": [(BODY, UNORDERED_AND_NO_MORE)],
    "one-by-one": [(BODY, ONE_BY_ONE)],
    "stored-by-subtraction": [(SUM, "report.stored = len(documents) - report.already_there")],
    "any-duplicate-was-there": [(IS_KNOWN, 'refusal["code"] == DUPLICATE_KEY')],
    "write-concern-passed-over": [(CONCERN, "if False:")],
    "write-concern-passed-over-beside-a-duplicate": [
        (CONCERN, 'if not error.details["writeErrors"]:')
    ],
    "lost-connection-passed-over": [
        ("import BulkWriteError", "import BulkWriteError, PyMongoError"),
        (REJECTED, f"{REJECTED}    except PyMongoError:\n        pass\n"),
    ],
}

RIGHT = {
    "bulk-write": [
        (
            "len(events.insert_many(documents, ordered=False).inserted_ids)",
            "events.bulk_write(list(map(InsertOne, documents)), ordered=False).inserted_count",
        ),
        (
            "from pymongo.collection",
            "from pymongo import InsertOne\nfrom pymongo.collection",
        ),
    ],
    "the-index-read-from-the-text": [
        ('refusal["keyPattern"] == {"_id": 1}', '"index: _id_ dup key" in refusal["errmsg"]')
    ],
}
