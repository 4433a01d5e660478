for (const row of document.querySelectorAll("#summary tr"))
  if (row.cells[0].textContent === "commit") row.cells[1].textContent = "64c2e4c89b3e, and edits of src that are not committed";
