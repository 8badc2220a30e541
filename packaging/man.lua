-- Makes a page of docs/ a man page for pandoc: tables become lists of terms, and links to other documents their text.

function Link(link)
  if not link.target:match("^%a+://") then
    return link.content
  end
end

function Header(header)
  if header.level == 2 then -- a section, before levels are shifted
    return header:walk({ Str = function(word) return pandoc.Str(pandoc.text.upper(word.text)) end })
  end
end

-- The first column is the term and the last one says what it is; one between them is said after it, by its title.
function Table(table)
  local titles = table.head.rows[1].cells
  local items = {}
  for _, row in ipairs(table.bodies[1].body) do
    local cells = row.cells
    local text = pandoc.utils.blocks_to_inlines(cells[#cells].contents)
    for column = 2, #cells - 1 do
      local value = pandoc.utils.blocks_to_inlines(cells[column].contents)
      if #value > 0 then
        text:extend({ pandoc.Str(" ("), pandoc.Str(pandoc.utils.stringify(titles[column].contents)), pandoc.Str(": ") })
        text:extend(value)
        text:insert(pandoc.Str(")"))
      end
    end
    local term = pandoc.utils.blocks_to_inlines(cells[1].contents)
    items[#items + 1] = { term, { { pandoc.Plain(text) } } }
  end
  return pandoc.DefinitionList(items)
end
