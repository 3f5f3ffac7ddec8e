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
RAISED = "            raise\n"
GUARD = "    if not documents:\n        return report\n"
KNOWN = """    known = {
        found["_id"]
        for found in events.find(
            filter={"_id": {"$in": [document["_id"] for document in documents]}},
            projection={"_id": True},
        )
    }
    report.already_there = sum(document["_id"] in known for document in documents)
    documents = [document for document in documents if document["_id"] not in known]
"""
UPSERTED = """    from pymongo import UpdateOne
    upserts = [
        UpdateOne({"_id": document["_id"]}, {"$setOnInsert": document}, upsert=True)
        for document in documents
    ]
    try:
        done = events.bulk_write(upserts, ordered=False)
        report.stored, report.already_there = done.upserted_count, done.matched_count
    except BulkWriteError as error:
        if error.details["writeConcernErrors"]:
            raise
        report.stored = error.details["nUpserted"]
        report.already_there = error.details["nMatched"]
        for refusal in error.details["writeErrors"]:
            report.rejected[documents[refusal["index"]]["_id"]] = refusal["code"]
"""
ON_AND_ON = """    while documents:
        try:
            report.stored += len(events.insert_many(documents).inserted_ids)
            break
        except BulkWriteError as error:
            if error.details["writeConcernErrors"]:
                raise
            report.stored += error.details["nInserted"]
            refusal = error.details["writeErrors"][0]
            if refusal["code"] == DUPLICATE_KEY and refusal["keyPattern"] == {"_id": 1}:
                report.already_there += 1
            else:
                report.rejected[refusal["op"]["_id"]] = refusal["code"]
            documents = documents[refusal["index"] + 1 :]
"""

WRONG = {
    "still-ordered": [("(documents, ordered=False)", "(documents)")],
    "unordered-and-no-more": [(BODY, UNORDERED_AND_NO_MORE)],
    "one-by-one": [(BODY, ONE_BY_ONE)],
    "a-call-more-for-each-refusal": [(BODY, ON_AND_ON)],
    "asked-first-and-nothing-is-new": [(GUARD, KNOWN)],
    "asked-first-and-what-comes-twice-is-rejected": [(GUARD, KNOWN + GUARD), (IS_KNOWN, "False")],
    "rejected-by-position": [('refusal["op"]["_id"]', 'refusal["index"]')],
    "the-text-has-an-id": [('refusal["keyPattern"] == {"_id": 1}', '"_id" in refusal["errmsg"]')],
    "each-once": [
        (
            GUARD,
            f"{GUARD}    documents = list({{each['_id']: each for each in documents}}.values())\n",
        )
    ],
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
    "upserts": [(BODY, UPSERTED)],
    "asked-first": [(GUARD, KNOWN + GUARD)],
    "an-error-of-its-own": [
        ("import BulkWriteError", "import BulkWriteError, WriteConcernError"),
        (RAISED, '            raise WriteConcernError("not replicated") from error\n'),
    ],
    "the-index-read-from-the-text": [
        ('refusal["keyPattern"] == {"_id": 1}', '"index: _id_ dup key" in refusal["errmsg"]')
    ],
}
