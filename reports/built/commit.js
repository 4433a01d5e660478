for (const row of document.querySelectorAll("#summary tr"))
  if (row.cells[0].textContent === "commit") row.cells[1].textContent = "2516ad133ab7, and edits of src that are not committed";
